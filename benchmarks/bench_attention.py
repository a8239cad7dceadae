"""Attention beside every backend torch has, forward and with its gradients, with and without a position bias.

python -m benchmarks.bench_attention
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import OURS, Case, SkipProvider, device, fused_only, run, with_gradients
from nvit_kernels import Kept, functional, reference

SHAPES = {"deit_base": (64, 12, 197, 64, 64), "pruned 24/56": (64, 12, 197, 24, 56)}  # batch, heads, tokens, qk, v
BIASED = {  # batch of windows or images, heads, tokens, head dim, windows of an image (0: no mask)
    "swin_tiny stage 1": (64 * 64, 3, 49, 32, 64),
    "swin_tiny stage 3": (64 * 4, 12, 49, 32, 4),
    "beit_base": (64, 12, 197, 64, 0),
}
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa math": SDPBackend.MATH}  # fmt: skip


def sdpa(backend=None, pad=0):
    """torch's attention with one backend; with `pad`, heads are zero-padded to that many dims, as flash wants them."""

    def call(q, k, v, scale):
        width = v.shape[-1]
        if pad:
            q, k, v = (F.pad(t, (0, pad - t.shape[-1])) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]

    return call


def flex(q, k, v, scale):
    if not q.is_cuda:
        raise SkipProvider("flex_attention's compiled kernel is for GPUs")
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention)(q, k, v, scale=scale)


def biased_sdpa(backend=None):
    """torch's attention on one mask of all windows and heads, which every call has to make."""

    def call(q, k, v, bias, mask, scale):
        added = bias.to(q.dtype).unsqueeze(0)
        if mask is not None:
            added = added + mask.to(q.dtype).unsqueeze(1).repeat(len(q) // len(mask), 1, 1, 1)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)

    return call


def biased_flex(q, k, v, bias, mask, scale):
    if not q.is_cuda:
        raise SkipProvider("flex_attention's compiled kernel is for GPUs")
    from torch.nn.attention.flex_attention import flex_attention

    def of_head(score, b, h, m, n):
        return score + bias[h, m, n]

    def of_head_and_window(score, b, h, m, n):
        return score + bias[h, m, n] + mask[b % len(mask), m, n]

    return _compiled(flex_attention)(q, k, v, of_head if mask is None else of_head_and_window, scale=scale)


def biased_eager(q, k, v, bias, mask, scale):
    return reference.attention(q, k, v, scale, bias=bias, mask=mask)


def biased_ours(q, k, v, bias, mask, scale):
    return fused_only(lambda: functional.attention(q, k, v, scale, bias=bias, mask=mask))()


_cache: dict = {}


def _compiled(function):
    if function not in _cache:
        _cache[function] = torch.compile(function, dynamic=False)
    return _cache[function]


def biased_cases() -> list[Case]:
    """Swin's windows and BEiT's tokens: float32 bias and its gradient; at a small batch in float32 on a CPU."""
    there = device()
    dtype, made = (torch.bfloat16 if there.type == "cuda" else torch.float32), []
    for name, (batch, heads, tokens, dim, windows) in BIASED.items():
        batch, scale = batch if there.type == "cuda" else max(2, windows), dim**-0.5
        q, k, v = (torch.randn(batch, tokens, heads, dim, device=there, dtype=dtype).transpose(1, 2) for _ in range(3))
        bias, mask = torch.randn(heads, tokens, tokens, device=there), None
        if windows:
            shut = torch.rand(windows, tokens, tokens, device=there) < 0.25
            mask = torch.zeros(windows, tokens, tokens, device=there).masked_fill(shut, -100.0)
        calls = {OURS: biased_ours, "sdpa": biased_sdpa()}
        calls |= {label: biased_sdpa(backend) for label, backend in BACKENDS.items()}
        calls |= {"flex_attention": biased_flex, "eager": biased_eager}
        doubles = tuple(t.double() for t in (q, k, v, bias))
        moved = dtype.itemsize * batch * heads * tokens * 4 * dim
        made.append(Case(f"attention with bias forward {name} b{batch}",
                         {n: _on(c, q, k, v, bias, mask, scale) for n, c in calls.items()},
                         _on(biased_eager, *doubles, mask, scale), bytes=moved,
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
    dtype, made = (torch.bfloat16 if gpu else torch.float32), []
    for name, (batch, heads, tokens, qk, v_dim) in SHAPES.items():
        batch = batch if gpu else 2
        # the layout of a packed projection: token by token, then head by head
        q, k, v = (torch.randn(batch, tokens, heads, d, device=there, dtype=dtype).transpose(1, 2)
                   for d in (qk, qk, v_dim))  # fmt: skip
        scale, wide = 0.125, max(qk, v_dim)
        calls = {OURS: _ours()}
        calls |= {"sdpa": sdpa(), f"sdpa padded to {-(-wide // 64) * 64}": sdpa(pad=-(-wide // 64) * 64)}
        calls |= {label: sdpa(backend) for label, backend in BACKENDS.items()}
        calls |= {"flex_attention": flex, "eager": reference.attention}
        if gpu:
            calls["torch.compile"] = _compiled(reference.attention)
        exact = _on(reference.attention, q.double(), k.double(), v.double(), scale)
        moved = dtype.itemsize * batch * heads * tokens * 2 * (qk + v_dim)
        made.append(Case(f"attention forward {name} b{batch}", {n: _on(c, q, k, v, scale) for n, c in calls.items()},
                         exact, bytes=moved, flops=2 * batch * heads * tokens**2 * (qk + v_dim)))  # fmt: skip
        grads = _steps(reference.attention, q.double(), k.double(), v.double(), scale)
        made.append(Case(f"attention forward+backward {name} b{batch}",
                         {n: _steps(c, q, k, v, scale) for n, c in calls.items()}, grads, error=4e-2))  # fmt: skip
        if name == "deit_base":
            half = Kept.from_mask(torch.arange(heads, device=there) % 2 == 0)
            kept = {OURS: _ours(half), "eager": lambda q, k, v, s, half=half: reference.attention(q, k, v, s, half),
                    "sdpa of all heads, then zeros": lambda q, k, v, s, half=half: sdpa()(q, k, v, s)
                    * half.mask[:, None, None]}  # fmt: skip
            made.append(Case(f"attention forward {name} b{batch}, half of the heads",
                             {n: _on(c, q, k, v, scale) for n, c in kept.items()},
                             _on(kept["eager"], q.double(), k.double(), v.double(), scale)))  # fmt: skip
    return made + biased_cases()


def _ours(heads=None):
    def call(q, k, v, scale):
        return fused_only(lambda: functional.attention(q, k, v, scale, heads))()

    return call


def _on(call, *arguments):
    def forward():
        with torch.no_grad():
            return call(*arguments)

    return forward


def _steps(call, q, k, v, scale):
    return with_gradients(lambda q, k, v: call(q, k, v, scale), q, k, v)


if __name__ == "__main__":
    run(cases())
