"""Tokens merged by compiled code: by the definition in float64, as plain torch does it, and only where it may."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nvit.layers import functional as engine
from nvit_kernels import _native, functional, reference
from nvit_kernels.ops.merge_tokens import native
from tests.nvit_kernels.merged import check_choice, check_means, given_tokens, likeness_of, place_by_definition

pytestmark = pytest.mark.skipif(native.operator() is None, reason=_native.load().why_not_cpu or "an older library")


@settings(max_examples=60)
@given(st.data())
def test_any_shape_by_the_definition(data):
    tokens, prefix = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 5))
    r = data.draw(st.integers(0, max(0, tokens - prefix) // 2))
    shape = {name: data.draw(st.integers(*span)) for name, span in
             {"heads": (1, 4), "dims": (8, 80), "width": (1, 70), "seed": (0, 99)}.items()}  # fmt: skip
    x, keys, sizes = given_tokens(data.draw(st.integers(1, 3)), tokens, sizes=data.draw(st.booleans()), **shape)
    y, total, place = native.merge_tokens(x, keys, sizes, r, prefix)
    check_choice(likeness_of(keys, prefix), r, prefix, place)
    check_means(x, sizes, y, total, place)


@pytest.mark.parametrize(
    ("tokens", "r", "prefix"), [(1, 0, 5), (2, 1, 0), (3, 1, 1), (33, 16, 0), (198, 98, 2), (197, 16, 1), (700, 40, 1)]
)
@pytest.mark.parametrize("sizes", [True, False])
def test_as_plain_torch_does_it(tokens, r, prefix, sizes):
    x, keys, sizes = given_tokens(5, tokens, sizes=sizes)
    ours, theirs = (f(x, keys, sizes, r, prefix) for f in (native.merge_tokens, reference.merge_tokens))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-6)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


def test_whatever_lies_between_elements():
    x, keys, sizes = given_tokens(2, 21)
    expected = native.merge_tokens(x, keys, sizes, 5, 1)
    spread = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in (x, keys, sizes)]
    assert all(map(torch.equal, native.merge_tokens(*spread, 5, 1), expected))


def test_threads_do_not_matter():
    tokens, before = given_tokens(7, 60), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(native.merge_tokens(*tokens, 12, 1))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))


def test_of_equal_tokens_the_earlier_merge():
    x, keys = torch.full((1, 10, 5), 0.3), torch.ones(1, 2, 10, 4)
    y, total, place = native.merge_tokens(x, keys, None, 3, 2)
    assert total.tolist() == [[1, 1, 4, 1, 1, 1, 1]]
    assert place.tolist() == [[0, 1, 2, 2, 2, 3, 2, 4, 5, 6]]
    assert torch.equal(y, x[:, :7])


@pytest.mark.parametrize("tokens", [40, 131])
def test_ties_among_duplicates(tokens):
    """Five kinds of token, whose cosines are 0 or 1 however they are rounded."""
    x, _, sizes = given_tokens(4, tokens)
    kind = torch.randint(0, 5, (4, 1, tokens), generator=torch.Generator().manual_seed(1))
    keys = torch.eye(8)[kind]
    for r in (1, tokens // 4, (tokens - 1) // 2):
        y, total, place = native.merge_tokens(x, keys, sizes, r, 1)
        assert torch.equal(place, place_by_definition(keys, r, 1))
        assert torch.equal(place, reference.merge_tokens(x, keys, sizes, r, 1)[2])
        check_means(x, sizes, y, total, place)


@pytest.mark.parametrize("missing", [[5], [6], [1, 2, 3, 19], list(range(20))])
def test_a_nan_is_nobodys_nearest(missing):
    x, keys, _ = given_tokens(2, 20)
    keys = keys.clone()
    keys[0, 0, missing, 3] = torch.nan
    y, _, place = native.merge_tokens(x, keys, None, 4, 1)
    assert torch.equal(place, place_by_definition(keys, 4, 1))
    assert y.isfinite().all()


def test_no_image_at_all():
    x, keys, sizes = given_tokens(0, 9)
    y, total, place = native.merge_tokens(x, keys, sizes, 2, 1)
    assert y.shape == (0, 7, 20) and total.shape == (0, 7) and place.shape == (0, 9) and place.dtype == torch.int64


def test_what_does_not_fit_is_named():
    x, keys, _ = given_tokens(1, 9)
    with pytest.raises(ValueError, match=r"5 of 9 tokens cannot merge"):
        native.merge_tokens(x, keys, None, 5, 1)
    with pytest.raises((RuntimeError, ValueError), match="so many tokens cannot merge"):
        torch.ops.nvit._merge_tokens(x, keys, None, 5, 1)
    with pytest.raises((RuntimeError, ValueError), match="keys are not float32"):
        torch.ops.nvit._merge_tokens(x, keys[:, :, 1:], None, 1, 1)


def test_operator():
    x, keys, sizes = given_tokens(2, 21)
    torch.library.opcheck(native.operator(), (x, keys, sizes, 5, 1))
    torch.library.opcheck(native.operator(), (x, keys, None, 0, 1))


@pytest.fixture
def ran(monkeypatch):
    """Which way each call went."""
    calls = []
    for module, name in ((native, "native"), (reference, "plain")):
        run = module.merge_tokens
        monkeypatch.setattr(module, "merge_tokens", lambda *a, n=name, f=run: (calls.append(n), f(*a))[1])
    return calls


def both(x, keys, sizes=None):
    """By either door; the first output."""
    first, second = (door.merge_tokens(x, keys, sizes, 2, 1)[0] for door in (functional, engine))
    return first, second


@pytest.mark.skipif(functional.HAS_TRITON and functional.INTERPRET, reason="the interpreter has the kernels' code")
class TestChoice:
    def test_without_gradients_it_is_compiled_code(self, ran):
        x, keys, sizes = given_tokens(1, 9)
        both(x, keys, sizes)
        with torch.no_grad():
            both(x.requires_grad_(), keys, sizes.requires_grad_())
        assert ran == ["native"] * 4

    def test_gradients_go_through_plain_torch(self, ran):
        x, keys, sizes = given_tokens(1, 9)
        both(x, keys, sizes.requires_grad_())
        for out in both(x.requires_grad_(), keys):
            out.sum().backward()
        assert ran == ["plain"] * 4 and torch.equal(x.grad, 2 * torch.func.grad(lambda x: both(x, keys)[0].sum())(x))

    def test_tangents_go_through_plain_torch(self, ran):
        x, keys, _ = given_tokens(1, 9)
        _, moved = torch.func.jvp(lambda x: both(x, keys)[0], (x,), (torch.ones_like(x),))
        torch.testing.assert_close(moved, torch.ones(1, 7, 20))
        with torch.autograd.forward_ad.dual_level():
            both(torch.autograd.forward_ad.make_dual(x, x), keys)
        assert ran == ["plain"] * 4

    def test_other_dtypes_go_through_plain_torch(self, ran):
        x, keys, _ = given_tokens(1, 9)
        both(x.bfloat16(), keys.bfloat16())
        both(x, keys.half())
        both(x.double(), keys)
        assert ran == ["plain"] * 6

    def test_who_looks_on_sees_plain_torch(self, ran):
        x, keys, _ = given_tokens(1, 9)
        with FlopCounterMode(display=False) as counter:
            both(x, keys)
        assert ran == ["plain"] * 2 and counter.get_total_flops() > 0

    def test_a_program_has_plain_torch(self):
        x, keys, _ = given_tokens(1, 9)

        class Merge(torch.nn.Module):
            def forward(self, x, keys):
                return engine.merge_tokens(x, keys, None, 2, 1)[0]

        with torch.no_grad():
            exported = torch.export.export(Merge(), (x, keys)).graph_module.code
            compiled = torch.compile(Merge(), backend="eager", fullgraph=True)(x, keys)
        assert "aten.matmul" in exported and "_merge_tokens" not in exported
        torch.testing.assert_close(compiled, engine.merge_tokens(x, keys, None, 2, 1)[0], rtol=0, atol=2e-6)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_trace_has_none_of_it(self):
        x, keys, _ = given_tokens(1, 9)
        answers = [native.takes(x, keys, None)]
        torch.jit.trace(lambda x: (answers.append(native.takes(x, keys, None)), x + 1)[1], x, check_trace=False)
        assert answers == [True, False]

    def test_without_kernels_it_is_plain_torch(self, ran):
        x, keys, _ = given_tokens(1, 9)
        with engine.kernels(False):
            engine.merge_tokens(x, keys, None, 2, 1)
        assert ran == ["plain"]

    @pytest.mark.parametrize("lacks", ["library", "operator"])
    def test_where_it_is_not_built_it_is_plain_torch(self, lacks, ran, monkeypatch):
        if lacks == "library":
            monkeypatch.setattr(_native, "load", lambda: _native.Native(False, False))
        else:
            monkeypatch.setattr(torch.ops, "nvit", SimpleNamespace())
        monkeypatch.setattr(native, "operator", native.operator.__wrapped__)
        both(*given_tokens(1, 9)[:2])
        assert ran == ["plain"] * 2
