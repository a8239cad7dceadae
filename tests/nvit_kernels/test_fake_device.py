"""On a fake GPU: every op gives shapes and dtypes without a launch, and reads nothing on the host."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from nvit_kernels import Kept, functional
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    from triton.runtime.jit import JITFunction

    def refuse(self, *_, **__):
        raise AssertionError(f"{self.fn.__name__} was launched")

    monkeypatch.setattr(JITFunction, "run", refuse)


@pytest.fixture
def made():
    """made(shape): a tensor on a fake cuda:0; kept(width): a list there, as one made outside and moved."""
    with FakeTensorMode() as mode:
        yield (
            lambda *shape, dtype=torch.bfloat16, grad=False: torch.empty(
                *shape, dtype=dtype, device="cuda", requires_grad=grad
            ),
            lambda width: Kept(*(mode.from_tensor(t).to("cuda") for t in lists(width))),
        )


def lists(width):
    kept = Kept.from_mask(torch.arange(width) % 3 > 0)
    return kept.index, kept.count, kept.mask


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_attention(made, listed, grad):
    tensor, kept = made
    q, k = tensor(2, 3, 17, 24, grad=grad), tensor(2, 3, 17, 24)
    v = tensor(2, 3, 17, 56)
    lists = (kept(3), kept(24), kept(56)) if listed else ()
    out = functional.attention(q, k, v, 0.2, *lists, bias=tensor(3, 17, 17), mask=tensor(2, 17, 17))
    assert out.shape == (2, 3, 17, 56) and out.dtype == q.dtype and out.is_cuda and out.requires_grad is grad
    assert out.stride() == torch.empty(2, 17, 3, 56).transpose(1, 2).stride()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_mlps(made, name, listed, grad):
    tensor, kept = made
    inner = (tensor(96, 40, grad=grad), tensor(96)) * (1 if name == "mlp" else 2)
    out = getattr(functional, name)(tensor(2, 17, 40), *inner, tensor(24, 96), None, kept(96) if listed else None)
    assert out.shape == (2, 17, 24) and out.is_cuda and out.requires_grad is grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_kept_layer_norm(made, listed, residual, bias):
    tensor, kept = made
    x, more = tensor(2, 17, 40, grad=True), tensor(2, 17, 40) if residual else None
    out = functional.kept_layer_norm(x, tensor(40), tensor(40) if bias else None, kept(40) if listed else None,
                                     residual=more)  # fmt: skip
    for t in out if residual else (out,):
        assert t.shape == x.shape and t.dtype == x.dtype and t.is_cuda and t.requires_grad


def test_group_dot_leaves_no_fake_table_behind(made):
    tensor, _ = made
    plan = GroupDotPlan([DotSlice("w", 0, None, (40, 24), 0, 0)], {"w": (40, 24)})
    params, grads = ({"w": tensor(40, 24, grad=grad)} for grad in (True, False))
    out = functional.group_dot(params, grads, plan)
    assert out.shape == (40,) and out.dtype == torch.float32 and out.is_cuda
    assert not plan._tables
