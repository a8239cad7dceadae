"""Attention beside every backend torch has, forward and with its gradients, with and without a position bias.

python -m benchmarks.kernels.attention
"""

from __future__ import annotations

import torch

from benchmarks.harness import OURS, Case, device, run
from benchmarks.kernels.attention_peers import biased_calls, flash_calls, flex, sdpa, sdpa_calls
from benchmarks.kernels.calls import compiled, forward, fused_only, with_gradients
from nvit_kernels import Kept, functional, reference

SHAPES = {"deit_base": (64, 12, 197, 64, 64), "pruned 24/56": (64, 12, 197, 24, 56)}  # batch, heads, tokens, qk, v
BIASED = {  # batch of windows or images, heads, tokens, head dim, windows of an image (0: no mask)
    "swin_tiny stage 1": (64 * 64, 3, 49, 32, 64),
    "swin_tiny stage 3": (64 * 4, 12, 49, 32, 4),
    "beit_base": (64, 12, 197, 64, 0),
}
SCALE = 0.125


def biased_eager(q, k, v, bias, mask, scale):
    return reference.attention(q, k, v, scale, bias=bias, mask=mask)


def biased_ours(q, k, v, bias, mask, scale):
    return fused_only(lambda: functional.attention(q, k, v, scale, bias=bias, mask=mask))


def biased_cases() -> list[Case]:
    """Swin's windows and BEiT's tokens: float32 bias and its gradient; at a small batch in float32 on a CPU."""
    there = device()
    dtype = torch.bfloat16 if there.type == "cuda" else torch.float32
    made = []
    for name, (batch, heads, tokens, dim, windows) in BIASED.items():
        batch = batch if there.type == "cuda" else max(2, windows)
        scale = dim**-0.5
        q, k, v = (torch.randn(batch, tokens, heads, dim, device=there, dtype=dtype).transpose(1, 2) for _ in range(3))
        bias, mask = torch.randn(heads, tokens, tokens, device=there), None
        if windows:
            shut = torch.rand(windows, tokens, tokens, device=there) < 0.25
            mask = torch.zeros(windows, tokens, tokens, device=there).masked_fill(shut, -100.0)
        calls = {OURS: biased_ours, **biased_calls(), "eager": biased_eager}
        doubles = tuple(t.double() for t in (q, k, v, bias))
        moved = dtype.itemsize * batch * heads * tokens * 4 * dim
        made.append(Case(f"attention with bias forward {name} b{batch}",
                         {n: forward(c, q, k, v, bias, mask, scale) for n, c in calls.items()},
                         forward(biased_eager, *doubles, mask, scale), bytes=moved,
                         flops=4 * batch * heads * tokens**2 * dim))  # fmt: skip
        made.append(Case(f"attention with bias forward+backward {name} b{batch}",
                         {n: _biased_steps(c, q, k, v, bias, mask, scale) for n, c in calls.items()},
                         _biased_steps(biased_eager, *doubles, mask, scale), error=4e-2))  # fmt: skip
    return made


def _biased_steps(call, q, k, v, bias, mask, scale):
    return with_gradients(lambda q, k, v, bias: call(q, k, v, bias, mask, scale), q, k, v, bias)


def cases() -> list[Case]:
    """Two shapes, and the first with half of its heads pruned; at a small batch in float32 on a CPU."""
    there = device()
    gpu = there.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    made = []
    for name, (batch, heads, tokens, qk, v_dim) in SHAPES.items():
        batch = batch if gpu else 2
        # the layout of a packed projection: token by token, then head by head
        q, k, v = (torch.randn(batch, tokens, heads, d, device=there, dtype=dtype).transpose(1, 2)
                   for d in (qk, qk, v_dim))  # fmt: skip
        calls = {OURS: _ours(), **sdpa_calls(max(qk, v_dim)), **flash_calls(), "flex_attention": flex}
        calls |= {"eager": reference.attention, "torch.compile": compiled(reference.attention)}
        doubles = [t.double() for t in (q, k, v)]
        moved = dtype.itemsize * batch * heads * tokens * 2 * (qk + v_dim)
        made.append(Case(f"attention forward {name} b{batch}",
                         {n: forward(c, q, k, v, SCALE) for n, c in calls.items()},
                         forward(reference.attention, *doubles, SCALE), bytes=moved,
                         flops=2 * batch * heads * tokens**2 * (qk + v_dim)))  # fmt: skip
        made.append(Case(f"attention forward+backward {name} b{batch}",
                         {n: _steps(c, q, k, v) for n, c in calls.items()}, _steps(reference.attention, *doubles),
                         error=4e-2))  # fmt: skip
        if name == "deit_base":
            made.append(_half_of_the_heads(f"attention forward {name} b{batch}, half of the heads", q, k, v))
    return made + biased_cases()


def _half_of_the_heads(name: str, q, k, v) -> Case:
    half = Kept.from_mask(torch.arange(q.shape[1], device=q.device) % 2 == 0)

    def eager(q, k, v, scale):
        return reference.attention(q, k, v, scale, half)

    def then_zeros(q, k, v, scale):
        return sdpa()(q, k, v, scale) * half.mask[:, None, None]

    calls = {OURS: _ours(half), "eager": eager, "sdpa of all heads, then zeros": then_zeros}
    doubles = [t.double() for t in (q, k, v)]
    return Case(name, {n: forward(c, q, k, v, SCALE) for n, c in calls.items()}, forward(eager, *doubles, SCALE))


def _ours(heads=None):
    def call(q, k, v, scale):
        return fused_only(lambda: functional.attention(q, k, v, scale, heads))

    return call


def _steps(call, q, k, v):
    return with_gradients(lambda q, k, v: call(q, k, v, SCALE), q, k, v)


if __name__ == "__main__":
    run(cases())
