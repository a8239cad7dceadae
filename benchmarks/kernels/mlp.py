"""The masked MLP beside masked dense, physically sliced, and index_select with the vendor's matmul.

python -m benchmarks.kernels.mlp
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import OURS, Case, device, run
from benchmarks.kernels.calls import compiled, forward, fused_only, with_gradients
from nvit_kernels import Kept, functional, reference, ways

TOKENS, WIDTH, HIDDEN = 64 * 197, 768, 3072
KEEP = (3072, 1536, 1104)
SLICED = "sliced beforehand"


def cases() -> list[Case]:
    """DeiT-B's MLP with all, half and 36 % of its hidden units; DeiT-Ti's at one image on a CPU."""
    there = device()
    gpu = there.type == "cuda"
    tokens, width, hidden = (TOKENS, WIDTH, HIDDEN) if gpu else (2 * 197, WIDTH // 4, HIDDEN // 4)
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = ((tokens, width), (hidden, width), (hidden,), (width, hidden), (width,))
    tensors = [torch.randn(s, device=there).mul_(s[-1] ** -0.5).to(dtype) for s in shapes]
    doubles = [t.double() for t in tensors]
    made = []
    for keep in KEEP:
        n = keep * hidden // HIDDEN
        mask = torch.zeros(hidden, dtype=torch.bool, device=there)
        mask[torch.randperm(hidden, device=there)[:n]] = True
        kept = Kept.from_mask(mask)
        calls = _providers(kept, mask)
        flops = 4 * tokens * width * n

        def exact(x, w1, b1, w2, b2, kept=kept):
            return reference.mlp(x, w1, b1, w2, b2, kept)

        name = f"{tokens} tokens {width}, {n} of {hidden}"
        index = mask.nonzero().squeeze(1)
        once = {p: forward(c, *tensors) for p, c in calls.items()} | {SLICED: _sliced_forward(index, tensors)}
        steps = {p: with_gradients(c, *tensors) for p, c in calls.items() if "_addmm" not in p}
        steps[SLICED] = _sliced_step(index, tensors)
        made.append(Case(f"mlp forward {name}", once, forward(exact, *doubles), flops=flops))
        made.append(Case(f"mlp forward+backward {name}", steps, with_gradients(exact, *doubles), error=4e-2,
                         flops=3 * flops))  # fmt: skip
    return made


def _plain(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _cut(index, tensors):
    """Weights of the kept hidden units alone."""
    x, w1, b1, w2, b2 = tensors
    return [t.contiguous() for t in (x, w1[index], b1[index], w2[:, index], b2)]


def _sliced_forward(index, tensors):
    return forward(_plain, *_cut(index, tensors))


def _sliced_step(index, tensors):
    """A compact model's step: gradients by the cut weights, compared after they are put back among zeros."""
    step = with_gradients(_plain, *_cut(index, tensors))

    def comparable():
        dx, dw1, db1, dw2, db2 = step()
        whole = [torch.zeros_like(t) for t in tensors[1:4]]
        whole[0][index] = dw1
        whole[1][index] = db1
        whole[2][:, index] = dw2
        return dx, *whole, db2

    step.comparable = comparable
    return step


def _providers(kept, mask):
    index = mask.nonzero().squeeze(1)

    def ours(way):
        def call(x, w1, b1, w2, b2):
            for op in ("mlp", "mlp_backward"):
                ways.prefer(op, way)
            try:
                return fused_only(lambda: functional.mlp(x, w1, b1, w2, b2, kept))
            finally:
                ways.prefer("mlp", None)  # the backward of a timed step runs later, so its preference stays

        return call

    def masked_dense(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)) * mask, w2, b2)

    def selected(x, w1, b1, w2, b2):
        return _plain(x, w1.index_select(0, index), b1[index], w2.index_select(1, index), b2)

    def addmm(x, w1, b1, w2, b2):
        hidden = torch._addmm_activation(b1[index], x, w1.index_select(0, index).T, use_gelu=True)
        return F.linear(hidden, w2.index_select(1, index), b2)

    return {
        **{f"{OURS} {way}": ours(way) for way in ways.WAYS},
        f"{OURS} measured choice": ours(None),
        "masked dense": masked_dense,
        "index_select + linear": selected,
        "index_select + linear, torch.compile": compiled(selected),
        "_addmm_activation": addmm,
    }


if __name__ == "__main__":
    run(cases())
