import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvit_kernels import functional, reference
from nvit_kernels.ops.group_dot import op
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

SHAPES = {"qkv.weight": (216, 40), "qkv.bias": (216,), "fc1.weight": (104, 40), "fc1.bias": (104,),
          "fc2.weight": (40, 104), "pos_embed": (1, 17, 40), "patch.weight": (40, 3, 4, 4), "proj.weight": (40, 72),
          "merge.weight": (48, 160), "table": (33, 7)}  # fmt: skip
HEADS, QK, V, MLP, EMB, TABLE = 0, 3, 27, 51, 155, 195
SLICES = [
    *(DotSlice("qkv.weight", 72 * i, 72 * i + 72, (3, 24, 40), 0, HEADS) for i in range(3)),
    *(DotSlice("qkv.bias", 72 * i, 72 * i + 72, (3, 24), 0, HEADS) for i in range(3)),
    *(DotSlice("qkv.weight", 72 * i, 72 * i + 72, (3, 24, 40), 1, QK) for i in range(2)),
    *(DotSlice("qkv.bias", 72 * i, 72 * i + 72, (3, 24), 1, QK) for i in range(2)),
    DotSlice("qkv.weight", 144, None, (3, 24, 40), 1, V), DotSlice("proj.weight", 0, None, (40, 3, 24), 2, V),
    DotSlice("proj.weight", 0, None, (40, 3, 24), 1, HEADS), DotSlice("proj.weight", 0, None, (40, 72), 0, EMB),
    DotSlice("fc1.weight", 0, None, (104, 40), 0, MLP), DotSlice("fc1.bias", 0, None, (104,), 0, MLP),
    DotSlice("fc2.weight", 0, None, (40, 104), 1, MLP), DotSlice("fc1.weight", 0, None, (104, 40), 1, EMB),
    DotSlice("qkv.weight", 0, 144, (144, 40), 1, EMB), DotSlice("pos_embed", 0, None, (17, 40), 1, EMB),
    DotSlice("patch.weight", 0, None, (40, 48), 0, EMB), DotSlice("merge.weight", 0, None, (48, 4, 40), 2, EMB),
    DotSlice("table", 0, None, (33, 7), 1, TABLE),
]  # fmt: skip


def data(dtype=torch.float32):
    return tuple({name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_columns_and_heads_from_one_read(dtype):
    params, grads = data(dtype)
    plan = GroupDotPlan(SLICES, SHAPES)
    ours = functional.group_dot(params, grads, plan, scale=0.5)
    doubles = [{k: t.double() for k, t in ts.items()} for ts in (params, grads)]
    exact, eager = (reference.group_dot(*ts, plan, scale=0.5) for ts in (doubles, (params, grads)))
    err, allowed = ((t.double() - exact).abs().max() for t in (ours, eager))
    assert ours.dtype == torch.float32 and err <= 2 * allowed + 4e-7 * exact.abs().max()


def test_bitwise_repeatable_and_scaled_by_a_device_number():
    params, grads = data()
    plan = GroupDotPlan(SLICES, SHAPES)
    first = functional.group_dot(params, grads, plan)
    assert torch.equal(first, functional.group_dot(params, grads, plan))
    amp = {k: g * 1024 for k, g in grads.items()}
    assert torch.equal(first, functional.group_dot(params, amp, plan, scale=torch.tensor(1 / 1024)))


def test_new_gradient_tensors_are_read_anew():
    params, grads = data()
    plan = GroupDotPlan(SLICES, SHAPES)
    first = functional.group_dot(params, grads, plan)
    assert torch.equal(functional.group_dot(params, {k: 2 * g for k, g in grads.items()}, plan), 2 * first)
    strided = {k: torch.stack([g, g], -1)[..., 0] for k, g in grads.items()}
    assert torch.equal(functional.group_dot(params, strided, plan), first)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), heads=st.integers(1, 4), dims=st.integers(1, 24), columns=st.integers(1, 300),
       axis=st.integers(0, 3))  # fmt: skip
def test_any_view_that_splits_into_rows_and_columns(rows, heads, dims, columns, axis):
    view = (heads, dims, 2, columns)
    shapes = {"w": (rows + heads * dims * 2, columns)}
    plan = GroupDotPlan([DotSlice("w", rows, None, view, axis, 5)], shapes)
    w, g = ({"w": torch.randn(shapes["w"])} for _ in range(2))
    expected = (w["w"] * g["w"])[rows:].double().view(view).movedim(axis, 0).flatten(1).sum(1)
    got = functional.group_dot(w, g, plan)
    assert got.shape == (5 + view[axis],) and (got[:5] == 0).all()
    torch.testing.assert_close(got[5:].double(), expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_mixed_dtypes_are_refused():
    params, grads = data()
    params["table"] = params["table"].half()
    with pytest.raises(ValueError, match="a plan per dtype"):
        op.group_dot(params, grads, GroupDotPlan(SLICES, SHAPES))


def test_opcheck():
    params, grads = data()
    plan = GroupDotPlan(SLICES, SHAPES)
    t = plan.tables(torch.device("cpu"), op.BLOCK)
    tensors = [[each[name] for name in plan.names] for each in (params, grads)]
    torch.library.opcheck(op.operator, (*tensors, t.tiles[8], t.tiles[1],
                                          t.reductions, t.outputs, t.contributions, torch.ones(1), t.workspace,
                                          t.slice_sums, plan.outputs))  # fmt: skip
