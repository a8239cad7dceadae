"""What the cases of kernels share: a call without gradients, with them, compiled, or on a GPU alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import SkipProvider, device


def fused_only(call: Callable[[], Tensor]) -> Tensor:
    """The result of `call`, skipped where kernels would run in the interpreter or not at all."""
    if device().type != "cuda":
        raise SkipProvider("the kernels need a GPU; correctness on a CPU is in the tests")
    return call()


def forward(call: Callable[..., Tensor], *arguments) -> Callable[[], Tensor]:
    """`call` on the arguments, without gradients."""

    def run():
        with torch.no_grad():
            return call(*arguments)

    return run


def with_gradients(call: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """`call` on the tensors, then its gradients by all of them, along the first call's output shape."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def step():
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


_COMPILED: dict[Callable, Callable] = {}


def compiled(function: Callable) -> Callable:
    """torch.compile of a function, once for all cases; skipped without a GPU."""

    def call(*arguments, **options):
        if device().type != "cuda":
            raise SkipProvider("compiled code is compared on GPUs")
        if function not in _COMPILED:
            # One function serves the shapes of all cases; over the limit torch.compile would run it eagerly.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            _COMPILED[function] = torch.compile(function, dynamic=False)
        return _COMPILED[function](*arguments, **options)

    return call
