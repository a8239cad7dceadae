"""The masked MLP beside masked dense, physically sliced, and index_select with the vendor's matmul.

python -m benchmarks.bench_mlp
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import OURS, Case, SkipProvider, device, fused_only, run, with_gradients
from nvit_kernels import Kept, functional, reference, ways

TOKENS, WIDTH, HIDDEN = 64 * 197, 768, 3072
KEEP = (3072, 1536, 1104)


def cases() -> list[Case]:
    """DeiT-B's MLP with all, half and 36 % of its hidden units; DeiT-Ti's at one image on a CPU."""
    there = device()
    gpu = there.type == "cuda"
    tokens, width, hidden = (TOKENS, WIDTH, HIDDEN) if gpu else (2 * 197, WIDTH // 4, HIDDEN // 4)
    dtype = torch.bfloat16 if gpu else torch.float32
    x, w1, b1, w2, b2 = (torch.randn(s, device=there).mul_(s[-1] ** -0.5).to(dtype) for s in
                         ((tokens, width), (hidden, width), (hidden,), (width, hidden), (width,)))  # fmt: skip
    made = []
    for keep in KEEP:
        n = keep * hidden // HIDDEN
        mask = torch.zeros(hidden, dtype=torch.bool, device=there)
        mask[torch.randperm(hidden, device=there)[:n]] = True
        kept = Kept.from_mask(mask)
        calls = _providers(kept, mask)
        flops = 4 * tokens * width * n
        doubles = [t.double() for t in (x, w1, b1, w2, b2)]

        def exact(x, w1, b1, w2, b2, kept=kept):
            return reference.mlp(x, w1, b1, w2, b2, kept)

        name = f"{tokens} tokens {width}, {n} of {hidden}"
        made.append(Case(f"mlp forward {name}", {p: _on(c, x, w1, b1, w2, b2) for p, c in calls.items()},
                         _on(exact, *doubles), flops=flops))  # fmt: skip
        made.append(Case(f"mlp forward+backward {name}", {p: with_gradients(c, x, w1, b1, w2, b2) for p, c in
                                                         calls.items() if "_addmm" not in p},
                         with_gradients(exact, *doubles), error=4e-2, flops=3 * flops))  # fmt: skip
    return made


def _providers(kept, mask):
    index = mask.nonzero().squeeze(1)

    def ours(way):
        def call(x, w1, b1, w2, b2):
            for op in ("mlp", "mlp_backward"):
                ways.prefer(op, way)
            try:
                return fused_only(lambda: functional.mlp(x, w1, b1, w2, b2, kept))()
            finally:
                ways.prefer("mlp", None)  # the backward of a timed step runs later, so its preference stays

        return call

    def masked_dense(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)) * mask, w2, b2)

    cut: dict = {}

    def sliced(x, w1, b1, w2, b2):
        if not cut:
            cut["w"] = [t.detach().contiguous() for t in (w1[index], b1[index], w2[:, index])]
        if w1.requires_grad:
            raise SkipProvider("gradients of cut weights have other shapes; see the compact model in bench_model")
        return F.linear(F.gelu(F.linear(x, cut["w"][0], cut["w"][1])), cut["w"][2], b2)

    def selected(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1.index_select(0, index), b1[index])), w2.index_select(1, index), b2)

    def addmm(x, w1, b1, w2, b2):
        hidden = torch._addmm_activation(b1[index], x, w1.index_select(0, index).T, use_gelu=True)
        return F.linear(hidden, w2.index_select(1, index), b2)

    return {f"{OURS} fused": ours("fused"), f"{OURS} gather": ours("gather"), f"{OURS} measured choice": ours(None),
            "masked dense": masked_dense, "sliced beforehand": sliced, "index_select + linear": selected,
            "_addmm_activation": addmm}  # fmt: skip


def _on(call, *tensors):
    def forward():
        with torch.no_grad():
            return call(*tensors)

    return forward


if __name__ == "__main__":
    run(cases())
