"""Every sample's gate gradients of a timm DeiT, at every place where a gate could sit.

Recorded once, so that any saliency made of them costs no more backward passes. Two backward passes: `true`, of cross
entropy with the label, and `probe`, from a random cotangent v of the logits with E v vᵀ = diag(p) - p pᵀ, so that the
mean of squares is the Gauss-Newton diagonal without any label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nvit.calibration.statistics import SiteStatistics, gather_statistics

PASSES = ("true", "probe")
BATCH = 10


class _Sites:
    """Hooks on a model that add up `activation * grad` over tokens, by site; token statistics of some."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = defaultdict(float)
        self.count_tokens, self.hooks = True, []
        heads = model.blocks[0].attn.num_heads
        norms = [n for b in model.blocks for n in (b.norm1, b.norm2)] + [model.norm]
        self._enters(model.blocks[0], "write.0")
        for i, block in enumerate(model.blocks):
            self._leaves(block.mlp.fc1, f"mlp_enter.{i}")
            self._enters(block.mlp.fc2, f"mlp.{i}", tokens=True)
            self._enters(block.attn.proj, f"v.{i}", heads, tokens=True)
            self._leaves(block.attn.qkv, f"qkv.{i}", heads)
            self._leaves(block.attn, f"write.{2 * i + 1}")
            self._leaves(block.mlp, f"write.{2 * i + 2}")
        for i, norm in enumerate(norms):
            self._enters(norm, f"norm_in.{i}")
            self._leaves(norm, f"norm.{i}")

    def _enters(self, layer: nn.Module, *site, **more) -> None:
        hook = lambda _, inputs: (self._gate(inputs[0], *site, **more), *inputs[1:])  # noqa: E731
        self.hooks.append(layer.register_forward_pre_hook(hook))

    def _leaves(self, layer: nn.Module, *site, **more) -> None:
        self.hooks.append(layer.register_forward_hook(lambda _m, _i, out: self._gate(out, *site, **more)))

    def _gate(self, x: Tensor, name: str, heads: int = 0, tokens: bool = False) -> Tensor:
        # A view of its own: its gradient is that of this reader alone.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        act = x.detach()

        def read(grad: Tensor) -> None:
            product = act * grad
            total = product.sum(1)
            self.found[name] = total.view(len(total), -1, heads, 64) if heads else total
            if tokens and self.count_tokens:
                for key, value in (("energy", act.square()), ("abs", product.abs()), ("grad2", grad.square())):
                    self.tokens[f"tokens.{key}.{name}"] += value.sum((0, 1)).double()

        x.register_hook(read)
        return x

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def probe(p: Tensor) -> Tensor:
    """A cotangent of logits with softmax `p` `(batch, classes)` whose covariance is diag(p) - p pᵀ."""
    root = p.sqrt() * (torch.randint(0, 2, p.shape) * 2 - 1)
    return root - p * root.sum(-1, keepdim=True)


def record(
    model: nn.Module, samples: Sequence[tuple[Tensor, int]], progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """Gate gradients of every sample's own loss by pass and site, and token sums as means over samples.

    `PASS.mlp.I` and `PASS.mlp_enter.I` `(samples, hidden)`, `PASS.v.I` `(samples, 1, heads, dim)`, `PASS.qkv.I`
    `(samples, 3, heads, dim)`, `PASS.norm.I`, `PASS.norm_in.I`, `PASS.write.I` `(samples, emb)`, all fp32.
    """
    model.requires_grad_(False)
    sites, out = _Sites(model), {}
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        logits = model(torch.stack([image for image, _ in part]))
        p = logits.detach().softmax(-1)
        wrong = p - nn.functional.one_hot(torch.tensor([label for _, label in part]), p.shape[1])
        for name, cotangent in zip(PASSES, (wrong, probe(p)), strict=True):
            sites.count_tokens = name == "true"
            logits.backward(cotangent, retain_graph=name == "true")
            for site, value in sites.found.items():
                key = f"{name}.{site}"
                if key not in out:
                    # All at once: small pieces between large activations would keep the heap from shrinking.
                    out[key] = torch.empty(len(samples), *value.shape[1:])
                out[key][start : start + len(part)] = value
            sites.found.clear()
        progress(start + len(part))
    sites.close()
    return out | {name: (total / len(samples)).float() for name, total in sites.tokens.items()}


def token_products(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Products of two units' gate gradients as if tokens were independent of each other: E x xᵀ ∘ Σ_tokens E g gᵀ.

    The Kronecker factors of Martens & Grosse 2015 (arXiv:1503.05671), of a prepared model with its own probes of the
    logits' curvature. `pairs.mlp.I`, `pairs.heads.I`, `pairs.v_dim.I`, `pairs.qk_dim.I`, `pairs.emb.0`, fp32
    `(units, units)`.
    """
    seen = gather_statistics(model, [torch.stack(list(images[i : i + BATCH])) for i in range(0, len(images), BATCH)])

    def pairs(s: SiteStatistics) -> Tensor:
        return (s.xx / s.rows * s.curvature).float()

    out = {"pairs.emb.0": sum(pairs(s) for (_, place), s in seen.items() if place == "emb")}
    for i, block in enumerate(model.blocks):
        heads = block.attn.heads
        by_head = {end: pairs(seen[f"blocks.{i}.attn", end]) for end in ("out", "qk")}
        by_head = {end: p.view(heads, len(p) // heads, heads, -1) for end, p in by_head.items()}
        out[f"pairs.mlp.{i}"] = pairs(seen[f"blocks.{i}.mlp", "out"])
        out[f"pairs.heads.{i}"] = by_head["out"].sum((1, 3))
        out[f"pairs.v_dim.{i}"] = by_head["out"].sum((0, 2))
        out[f"pairs.qk_dim.{i}"] = by_head["qk"].sum((0, 2))
    return out
