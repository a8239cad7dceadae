"""LayerNorm over kept channels beside torch's own over all, masked eager, compiled, and index_select.

python -m benchmarks.kernels.kept_layer_norm
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import OURS, Case, device, run
from benchmarks.kernels.calls import compiled, forward, fused_only, with_gradients
from nvit_kernels import Kept, functional, reference

WIDTHS = {"deit_base": (768, 768), "deit_base at 65 %": (768, 496), "deit_tiny": (192, 192)}  # dense, kept


def masked(x, w, b, keep):
    """Statistics over kept channels by multiplication, as one would write it without an index."""
    n, m = keep.sum(), keep.to(x.dtype)
    mean = (x * m).sum(-1, keepdim=True) / n
    centred = (x - mean) * m
    var = (centred * centred).sum(-1, keepdim=True) / n
    return (centred * torch.rsqrt(var + 1e-6) * w + b) * m


def cases() -> list[Case]:
    there = device()
    gpu = there.type == "cuda"
    batch, dtype = (64, torch.bfloat16) if gpu else (4, torch.float32)
    made = []
    for name, (width, n) in WIDTHS.items():
        x = torch.randn(batch, 197, width, device=there, dtype=dtype)
        w, b = (torch.randn(width, device=there, dtype=dtype) for _ in range(2))
        mask = torch.arange(width, device=there) % width < n
        kept = None if n == width else Kept.from_mask(mask)
        calls = {
            OURS: lambda x, w, b, kept=kept: fused_only(lambda: functional.kept_layer_norm(x, w, b, kept)),
            "masked eager": lambda x, w, b, mask=mask: masked(x, w, b, mask),
            "index_select + layer_norm": lambda x, w, b, kept=kept: reference.kept_layer_norm(x, w, b, kept),
        }
        if n == width:
            calls["torch layer_norm"] = lambda x, w, b, width=width: F.layer_norm(x, (width,), w, b, 1e-6)
        calls["torch.compile of masked"] = lambda x, w, b, mask=mask: compiled(masked)(x, w, b, mask)
        doubles = [t.double() for t in (x, w, b)]

        def exact(x, w, b, kept=kept):
            return reference.kept_layer_norm(x, w, b, kept)

        label = f"{name}, {n} of {width}, b{batch}"
        made.append(Case(f"kept_layer_norm forward {label}", {p: forward(c, x, w, b) for p, c in calls.items()},
                         forward(exact, *doubles), bytes=2 * x.nbytes))  # fmt: skip
        made.append(Case(f"kept_layer_norm forward+backward {label}",
                         {p: with_gradients(c, x, w, b) for p, c in calls.items()}, with_gradients(exact, *doubles),
                         error=4e-2, bytes=5 * x.nbytes))  # fmt: skip
    return made


if __name__ == "__main__":
    run(cases())
