"""The eager path is Python and launches; the registered operator runs where torch must see one, and gives the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nvit_kernels import Kept, functional
from nvit_kernels.launch import MOST_PLANS, remember
from nvit_kernels.ops.attention import op as attention
from nvit_kernels.ops.group_dot import op as group_dot
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan
from nvit_kernels.ops.kept_layer_norm import op as kept_layer_norm
from nvit_kernels.ops.mlp import op as mlp
from nvit_kernels.ops.swiglu import op as swiglu


def kept(width):
    return Kept.from_mask(torch.arange(width) % 3 > 0)


def case(name):
    """(module, call on leaves and score buffers, leaves, shapes of the buffers)."""
    torch.manual_seed(0)
    if name == "attention":
        leaves = [torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 16), torch.randn(3, 9, 9)]
        lists = (kept(3), None, kept(16))
        return (
            attention,
            lambda q, k, v, b, *s: functional.attention(q, k, v, 0.3, *lists, *s, bias=b),
            leaves,
            ((2, 3), (8,), (2, 16)),
        )
    if name == "layer norm":
        leaves = [torch.randn(2, 9, 24), torch.randn(24), torch.randn(24), torch.randn(2, 9, 24)]
        return (
            kept_layer_norm,
            lambda x, w, b, r, s: sum(functional.kept_layer_norm(x, w, b, kept(24), residual=r, scores=s)),
            leaves,
            ((2, 24),),
        )
    shapes = [(40, 24), (40,)] * (2 if name == "swiglu" else 1)
    leaves = [torch.randn(2, 9, 24), *(torch.randn(s) for s in shapes), torch.randn(24, 40), torch.randn(24)]
    call = getattr(functional, name)
    return {"mlp": mlp, "swiglu": swiglu}[name], lambda *t: call(*t[:-1], kept(40), t[-1]), leaves, ((2, 40),)


OPS = ["attention", "layer norm", "mlp", "swiglu"]


class Seen(TorchDispatchMode):
    """Which of our operators torch saw."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [str(func)] if "nvit" in str(func) else []
        return func(*args, **kwargs or {})


def step(name):
    _, call, leaves, shapes = case(name)
    leaves, buffers = [t.requires_grad_() for t in leaves], [torch.zeros(s) for s in shapes]
    out = call(*leaves, *buffers)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves), *buffers]


@pytest.mark.parametrize("name", OPS)
def test_both_paths_give_the_same_bits(name, monkeypatch):
    with Seen() as seen:
        operator = step(name)
    assert len(seen.names) >= 1, "the operator did not run under a dispatch mode"
    module = case(name)[0]
    for which in ("operator", "operator_backward"):
        monkeypatch.setattr(module, which, lambda *_: pytest.fail("the eager path ran the operator"))
    for ours, expected in zip(step(name), operator, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", OPS)
def test_without_gradients_nothing_is_saved_and_the_result_is_the_same(name):
    _, call, leaves, shapes = case(name)
    buffers = [torch.zeros(s) for s in shapes]
    with torch.no_grad():
        out = call(*leaves, *buffers)
    assert out.grad_fn is None and torch.equal(out, call(*leaves, *buffers))


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused(name):
    _, call, leaves, _ = case(name)
    leaves = [t.requires_grad_() for t in leaves]
    (first,) = torch.autograd.grad(call(*leaves, *[None] * (3 if name == "attention" else 1)).square().sum(),
                                   leaves[:1], create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_a_checkpointed_call_gives_the_same_gradients(name):
    _, call, leaves, shapes = case(name)
    expected = step(name)
    leaves, buffers = [t.requires_grad_() for t in leaves], [torch.zeros(s) for s in shapes]
    checkpoint(call, *leaves, *buffers, use_reentrant=False).square().sum().backward()
    for leaf, grad in zip(leaves, expected[1:], strict=False):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("name", OPS)
def test_a_list_changed_between_the_passes_is_refused(name):
    """The backward must read what the forward read."""
    _, _, leaves, _ = case(name)
    lists, x = kept(40), leaves[0].requires_grad_()
    if name == "attention":
        out = functional.attention(x, *leaves[1:3], 0.3, heads=(lists := kept(3)))
    elif name == "layer norm":
        out = functional.kept_layer_norm(x, *leaves[1:3], lists := kept(24))
    else:
        out = getattr(functional, name)(*leaves, lists)
    lists.update_(~lists.mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_group_dot_takes_the_operator_under_a_mode_and_not_otherwise(monkeypatch):
    plan = GroupDotPlan([DotSlice("w", 0, None, (40, 24), 1, 0)], {"w": (40, 24)})
    w, g = ({"w": torch.randn(40, 24)} for _ in range(2))
    with Seen() as seen:
        expected = functional.group_dot(w, g, plan)
    assert seen.names == ["nvit.group_dot.default"]
    monkeypatch.setattr(group_dot, "operator", lambda *_: pytest.fail("the eager path ran the operator"))
    assert torch.equal(functional.group_dot(w, g, plan), expected)


def test_plans_are_made_once_and_never_pile_up():
    _, call, leaves, _ = case("attention")
    call(*leaves, None, None, None)
    before = len(attention._plans)
    for _ in range(3):
        call(*leaves, None, None, None)
    assert len(attention._plans) == before
    plans = {i: i for i in range(MOST_PLANS)}
    remember(plans, "another", 1)
    assert plans == {"another": 1}


def test_a_new_precision_makes_a_new_plan():
    _, call, leaves, _ = case("attention")
    call(*leaves, None, None, None)
    before, precision = len(attention._plans), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        call(*leaves, None, None, None)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert len(attention._plans) == before + 1
