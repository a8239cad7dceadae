"""Bind and compile, for sm_90 and without a GPU, what eager calls on edge shapes would launch; one line a kernel.

The interpreter takes what the compiler refuses (a number that is 1 becomes a constant, branches of two types), and the
cases compiled ahead of time are of common shapes. Run in a process of its own: Triton's driver is replaced.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nvit_kernels import Kept, functional, ways
from nvit_kernels.functional import DotSlice, GroupDotPlan
from nvit_kernels.ops.attention import short, short_plan


class NoDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def bind_only():
    """Let CPU tensors take the fused path, where every launch stops when its kernel is compiled."""
    run = JITFunction.run

    def compiled(self, *arguments, warmup, **options):
        kernel = run(self, *arguments, warmup=True, **options)
        print(self.fn.__name__, kernel.metadata.name, flush=True)

    driver.set_active(NoDevice())
    JITFunction.run = compiled
    functional.INTERPRET = True


def half(*shape):
    return torch.randn(shape).half().requires_grad_()


def kept(width):
    return Kept.from_mask(torch.arange(width) % 3 != 1)


def attention():
    functional.attention(half(1, 1, 1, 8), half(1, 1, 1, 8), half(1, 1, 1, 8), 0.2).sum().backward()
    lists, scores = (kept(2), kept(8), kept(24)), (torch.zeros(2, 2), torch.zeros(8), torch.zeros(2, 24))
    added = dict(bias=half(2, 17, 17), mask=torch.randn(1, 17, 17))
    out = functional.attention(half(2, 2, 17, 8), half(2, 2, 17, 8), half(2, 2, 17, 24), 0.2, *lists, *scores, **added)
    out.sum().backward()


def short_attention():
    """With a mass and without, apart and packed, with scores and without."""
    short_plan.INTERPRET, short_plan.architecture = True, lambda device: 90
    q, packed = half(2, 2, 33, 32), half(1, 23, 3, 2, 32)
    for mass in (None, torch.randn(2, 33)):
        scores = (torch.zeros(2, 2), None, torch.zeros(32))
        short.attention_short(q, q, q, 0.2, mass=mass).sum().backward()
        short.attention_short(q, q, q, 0.2, *scores, mass).sum().backward()
        short.attention_short_packed(packed, 0.2, mass=None if mass is None else mass[:1, :23]).sum().backward()


def layer_norm():
    functional.kept_layer_norm(half(1, 1, 8), half(8), None).sum().backward()
    both = functional.kept_layer_norm(half(2, 9, 7), half(7), half(7), kept(7), residual=half(2, 9, 7),
                                      scores=torch.zeros(2, 7))  # fmt: skip
    sum(both).sum().backward()


def mlps():
    for name, inner in (("mlp", 1), ("swiglu", 2)):
        op = getattr(functional, name)
        for way in ways.WAYS:
            for each in ways.OPS:
                ways.prefer(each, way)
            smallest = (half(1, 1, 8), *(half(8, 8), half(8)) * inner, half(8, 8), half(8))
            op(*smallest).sum().backward()
            x, weights = half(2, 9, 24), [half(104, 24), None] * inner
            op(x, *weights, half(40, 104), None, kept(104), torch.zeros(2, 104)).sum().backward()
        with torch.no_grad():
            op(*smallest)


def group_dot():
    for shape in ((1, 8), (300, 7)):
        plan = GroupDotPlan([DotSlice("w", 0, None, shape, axis, 300 * axis) for axis in (0, 1)], {"w": shape})
        functional.group_dot({"w": torch.randn(shape)}, {"w": torch.randn(shape)}, plan)


def merging():
    functional.merge_tokens(half(1, 1, 8), torch.randn(1, 1, 1, 8).half(), None, 0, 0)[0].sum().backward()
    x, sizes = half(2, 26, 24), torch.ones(2, 26, requires_grad=True)
    y, total, _ = functional.merge_tokens(x, torch.randn(2, 26, 3, 40).half().transpose(1, 2), sizes, 8, 2)
    (y.float().sum() + total.sum()).backward()
    functional.merge_tokens(torch.randn(1, 197, 192), torch.randn(1, 3, 197, 64), None, 16)


if __name__ == "__main__":
    bind_only()
    for part in (attention, short_attention, layer_norm, mlps, group_dot, merging):
        part()
