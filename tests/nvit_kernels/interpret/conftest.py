"""Kernel, reference in the same dtype and reference in float64, run alike and compared."""

import functools
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from nvit_kernels.kept import Kept


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter puts its own functions into `triton.language` at every call inside a kernel, though they are
    there since the launch, and looks up NumPy's dtypes in a new table each time: nearly half of what it does. Here a
    launch puts them there once, in both modules that a call may mean."""
    put, inside, every = interpreter._patch_lang, [], SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    slow = interpreter._get_np_dtype
    of_scalar = functools.cache(slow)

    class Launch:
        def __init__(self):
            self.scope = put(every)
            inside.append(self)

        def restore(self):
            inside.remove(self)
            self.scope.restore()

    def np_dtype(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return slow(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: inside[0] if inside else Launch())
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Every uninitialised float is NaN, so an element that no kernel wrote, or one read too far, shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_accurate(what, ours, eager, exact, dtype, factor=2.0, roundings=1):
    """Kernel error against float64 may be at most `factor` times PyTorch's own in the same dtype.

    Both errors are maxima over few elements, so where eager happens to hit, a few roundings of the largest value are
    granted, or of 1: inputs are of order 1, and a sum of them that cancels keeps their roundings. Float32 results are
    also accumulated in float32, the others are not; hence twice as many.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    err, allowed = ((t.double() - exact).abs().max().item() for t in (ours, eager))
    unit = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item()) * (4 if dtype == torch.float32 else 2)
    assert err <= factor * allowed + roundings * unit, f"{what}: {err:.2e}, PyTorch in {dtype} has {allowed:.2e}"


@pytest.fixture
def compare():
    """compare(ours, reference, tensors, score_shapes): outputs, gradients and scores, all as accurate as eager's.

    `ours` and `reference` are called with the tensors by name and with zeroed float32 score buffers by name.
    """

    def run(call, tensors, scores, grads):
        tensors = {k: t if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
        buffers = {k: torch.zeros(shape, dtype=grads[0].dtype if grads[0].dtype == torch.float64 else torch.float32)
                   for k, shape in scores.items()}  # fmt: skip
        out = call(**tensors, **buffers)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, grads[: len(out)])
        gradients = {f"gradient of {k}": t.grad for k, t in tensors.items() if t is not None}
        return {f"output {i}": t.detach() for i, t in enumerate(out)} | gradients | buffers

    def check(ours, reference, tensors, scores=None):
        scores = scores or {}
        doubles = {k: t if t is None else t.double() for k, t in tensors.items()}
        out = reference(**tensors)
        out = out if isinstance(out, tuple) else (out,)
        grads = [torch.randn(t.shape).to(t.dtype) for t in out]
        exact = run(reference, doubles, scores, [g.double() for g in grads])
        eager, mine = run(reference, tensors, scores, grads), run(ours, tensors, scores, grads)
        for what in exact:
            roundings = 2  # the interpreter adds the rows of a tile one after another, eager in pairs
            assert_as_accurate(what, mine[what], eager[what], exact[what], grads[0].dtype, roundings=roundings)
        return mine

    return check


def masks(width: int) -> dict[str, torch.Tensor | None]:
    """What may be kept of a width: no list at all, all of it, about half, one unit."""
    some = torch.arange(width) % 3 != 1
    return {"dense": None, "everything": torch.ones(width, dtype=torch.bool), "two thirds": some,
            "one unit": torch.arange(width) == width - 1}  # fmt: skip


def kept(width: int, which: str) -> Kept | None:
    mask = masks(width)[which]
    return None if mask is None else Kept.from_mask(mask)


@pytest.fixture
def keeping():
    return kept
