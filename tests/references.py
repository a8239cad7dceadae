"""Straight-line formulas from the equations, with explicit loops and zero masks: what the engine must reproduce.

Nothing here imports the engine. Parameters and gradients come by their host's names; masks as bool vectors by group
name. Widths are read off the tensors, heads are given.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# --- a masked vision transformer: dense weights, zero masks -----------------------------------------------------------


def masked_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, eps: float) -> Tensor:
    """LayerNorm whose mean and variance count kept channels only; pruned channels come out as zero."""
    k = keep.to(x)
    mean = (x * k).sum(-1, keepdim=True) / k.sum()
    centred = (x - mean) * k
    y = centred / torch.sqrt((centred**2).sum(-1, keepdim=True) / k.sum() + eps) * weight
    return (y if bias is None else y + bias) * k


def masked_attention(
    x: Tensor,
    w: dict[str, Tensor],
    heads: int,
    dense_head_dim: int,
    head: Tensor,
    qk: Tensor,
    v: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Head by head, with the dense model's logit scale; `w` holds qkv.weight, qkv.bias, proj.weight, proj.bias, and
    q_norm.weight and so on where queries and keys are normalised, over kept dims, by one norm for all heads."""
    d = dense_head_dim
    wq, wk, wv = w["qkv.weight"].split(heads * d)
    bq, bk, bv = (None,) * 3 if w.get("qkv.bias") is None else w["qkv.bias"].split(heads * d)
    outs = []
    for h in range(heads):
        rows = slice(h * d, (h + 1) * d)
        query = F.linear(x, wq[rows], None if bq is None else bq[rows]) * qk.to(x)
        key = F.linear(x, wk[rows], None if bk is None else bk[rows]) * qk.to(x)
        if "q_norm.weight" in w:
            query = masked_layer_norm(query, w["q_norm.weight"], w.get("q_norm.bias"), qk, eps)
            key = masked_layer_norm(key, w["k_norm.weight"], w.get("k_norm.bias"), qk, eps)
        value = F.linear(x, wv[rows], None if bv is None else bv[rows]) * v.to(x)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(d)).softmax(-1)
        outs.append(weights @ value * head[h].to(x))
    return F.linear(torch.cat(outs, -1), w["proj.weight"], w.get("proj.bias"))


def _first(w: dict[str, Tensor], block: str) -> list[str]:
    """The layers of an MLP before its activation: fc1, with a gate perhaps in two halves, or the gate and the value."""
    return [f"{block}mlp.{n}" for n in ("fc1", "fc1_g", "fc1_x") if f"{block}mlp.{n}.weight" in w]


def masked_vit(host, images: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Output of a timm VisionTransformer (never prepared) under masks, every product dense.

    The class token's logits, or for a distilled model the mean of both heads; a model without classifier gives its
    pooled channels, the kept ones.
    """
    w = dict(host.named_parameters())
    emb = masks["emb"]
    e, eps = emb.to(images), next(m.eps for m in (host.norm, host.fc_norm) if hasattr(m, "eps"))

    def norm(name: str, x: Tensor) -> Tensor:
        return masked_layer_norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"), emb, eps)

    x = F.conv2d(
        images, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=host.patch_embed.patch_size
    )
    x = x.flatten(2).transpose(1, 2)
    prefix = [w[n].expand(len(x), -1, -1) for n in ("cls_token", "dist_token", "reg_token") if n in w]
    place = w.get("pos_embed", torch.zeros(()))
    x = torch.cat([*prefix, x + place], 1) if host.no_embed_class else torch.cat([*prefix, x], 1) + place
    x = x * e
    if "norm_pre.weight" in w:
        x = norm("norm_pre", x)
    for i, block in enumerate(host.blocks):
        b = f"blocks.{i}."
        mine = {n.removeprefix(f"{b}attn."): p for n, p in w.items() if n.startswith(f"{b}attn.")}
        keeps = [masks[b + kind] for kind in ("heads", "qk_dim", "v_dim")]
        y = masked_attention(norm(f"{b}norm1", x), mine, block.attn.num_heads, block.attn.head_dim, *keeps, eps)
        x = x + y * w.get(f"{b}ls1.gamma", 1.0) * e
        parts = [
            part
            for name in _first(w, b)
            for part in F.linear(norm(f"{b}norm2", x), w[f"{name}.weight"], w.get(f"{name}.bias")).split(
                w[f"{b}mlp.fc2.weight"].shape[1], dim=-1
            )
        ]
        gate = parts.pop() if getattr(block.mlp, "gate_last", False) else parts.pop(0)
        hidden = block.mlp.act(gate) * (parts[0] if parts else 1)
        y = F.linear(hidden * masks[f"{b}mlp"].to(x), w[f"{b}mlp.fc2.weight"], w.get(f"{b}mlp.fc2.bias"))
        x = x + y * w.get(f"{b}ls2.gamma", 1.0) * e
    if "norm.weight" in w:
        x = norm("norm", x)
    if "dist_token" in w:
        both = F.linear(x[:, 0], w["head.weight"], w["head.bias"]) + F.linear(
            x[:, 1], w["head_dist.weight"], w["head_dist.bias"]
        )
        return both / 2
    patches = x if host.pool_include_prefix else x[:, host.num_prefix_tokens :]
    x = {"token": x[:, 0], "avg": patches.mean(1), "max": patches.amax(1)}[host.global_pool]
    if "fc_norm.weight" in w:
        x = norm("fc_norm", x)
    return F.linear(x, w["head.weight"], w["head.bias"]) if "head.weight" in w else x[:, emb]


# --- gate gradients and criteria --------------------------------------------------------------------------------------


def _product(w: dict[str, Tensor], g: dict[str, Tensor], name: str) -> Tensor | None:
    return w[name].detach() * g[name] if name in w else None


def gate_hessian(w: dict[str, Tensor], g: dict[str, Tensor], depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Sum of grad · weight where each unit leaves the network, unit by unit.

    mlp: fc2 columns. heads: proj columns of the head. v_dim: proj columns of that dim in every head. qk_dim: Q rows
    with bias, or weight and bias of the query norm. emb: columns of every reader of the stream: qkv, fc1, the
    classifiers.
    """
    out: dict[str, Tensor] = {}
    emb = w["blocks.0.attn.qkv.weight"].shape[1]
    readers = [f"blocks.{i}.attn.qkv.weight" for i in range(depth)]
    readers += [f"{name}.weight" for i in range(depth) for name in _first(w, f"blocks.{i}.")]
    readers += [name for name in ("head.weight", "head_dist.weight") if name in w]
    products = {name: _product(w, g, name) for name in readers}
    out["emb"] = torch.stack([sum(p[:, c].sum() for p in products.values()) for c in range(emb)])
    for i in range(depth):
        b = f"blocks.{i}."
        fc2, proj = _product(w, g, f"{b}mlp.fc2.weight"), _product(w, g, f"{b}attn.proj.weight")
        qkv, bias = _product(w, g, f"{b}attn.qkv.weight"), _product(w, g, f"{b}attn.qkv.bias")
        out[f"{b}mlp"] = torch.stack([fc2[:, j].sum() for j in range(fc2.shape[1])])
        out[f"{b}heads"] = torch.stack([proj[:, h * dim : (h + 1) * dim].sum() for h in range(heads)])
        out[f"{b}v_dim"] = torch.stack([sum(proj[:, h * dim + u].sum() for h in range(heads)) for u in range(dim)])
        qk = []
        for u in range(dim):
            rows = [h * dim + u for h in range(heads)]
            norm = [_product(w, g, f"{b}attn.q_norm.{leaf}") for leaf in ("weight", "bias")]
            if norm[0] is not None:
                qk.append(sum(p[u] for p in norm if p is not None))
                continue
            qk.append(sum(qkv[r].sum() for r in rows) + (0 if bias is None else sum(bias[r] for r in rows)))
        out[f"{b}qk_dim"] = torch.stack(qk)
    return out


def gate_nvit(w: dict[str, Tensor], g: dict[str, Tensor], depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Sum of grad · weight over the tensors of the published runs, divided by the kind's divisor.

    emb, by the number of blocks: patch-embedding rows and bias, Q, K, V columns, proj rows and bias, fc1 columns, fc2
    rows and bias. heads, by 12: Q, K, V rows with bias. qk_dim, by 2: Q rows with bias. v_dim, by 2: V rows with bias.
    mlp, by 1: fc1 rows with bias.
    """
    out: dict[str, Tensor] = {}

    def rows(name: str, index: list[int]) -> Tensor:
        weight, bias = _product(w, g, f"{name}.weight"), _product(w, g, f"{name}.bias")
        return sum(weight[r].sum() + (0 if bias is None else bias[r]) for r in index)

    for i in range(depth):
        b, n = f"blocks.{i}.", heads * dim
        out[f"{b}heads"] = torch.stack(
            [
                rows(f"{b}attn.qkv", [part * n + h * dim + u for part in range(3) for u in range(dim)]) / 12
                for h in range(heads)
            ]
        )
        out[f"{b}qk_dim"] = torch.stack(
            [rows(f"{b}attn.qkv", [h * dim + u for h in range(heads)]) / 2 for u in range(dim)]
        )
        out[f"{b}v_dim"] = torch.stack(
            [rows(f"{b}attn.qkv", [2 * n + h * dim + u for h in range(heads)]) / 2 for u in range(dim)]
        )
        hidden = w[f"{b}mlp.fc2.weight"].shape[1]
        out[f"{b}mlp"] = torch.stack(
            [
                sum(rows(name, list(range(j, w[f"{name}.weight"].shape[0], hidden))) for name in _first(w, b))
                for j in range(hidden)
            ]
        )
    emb = []
    for c in range(w["blocks.0.attn.qkv.weight"].shape[1]):
        total = rows("patch_embed.proj", [c])
        for i in range(depth):
            b = f"blocks.{i}."
            total = total + _product(w, g, f"{b}attn.qkv.weight")[:, c].sum() + rows(f"{b}attn.proj", [c])
            total = total + sum(_product(w, g, f"{name}.weight")[:, c].sum() for name in _first(w, b))
            total = total + rows(f"{b}mlp.fc2", [c])
        emb.append(total / depth)
    out["emb"] = torch.stack(emb)
    return out


def hessian(w, g, depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    return {name: gate**2 for name, gate in gate_hessian(w, g, depth, heads, dim).items()}


def nvit(w, g, depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    return {name: gate**2 for name, gate in gate_nvit(w, g, depth, heads, dim).items()}


def absolute(w, sample_grads: list, depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Mean over samples of |gate gradient| of the sample's own loss."""
    each = [gate_hessian(w, g, depth, heads, dim) for g in sample_grads]
    return {name: sum(e[name].abs() for e in each) / len(each) for name in each[0]}


def fisher(w, sample_grads: list, depth: int, heads: int, dim: int, shrink: float) -> dict[str, Tensor]:
    """Units leave one by one: the next is the one whose removal adds least to ½ Σ F over the pairs that are gone.

    F is the mean over samples of the products of gate gradients of the sample's own loss, products of different units
    times `shrink`. The saliency of a unit is the most that it or one before it added.
    """
    each = [gate_hessian(w, g, depth, heads, dim) for g in sample_grads]
    out = {}
    for name in each[0]:
        pairs = sum(e[name][:, None] * e[name][None, :] for e in each) / len(each)
        pairs = pairs * (shrink + (1 - shrink) * torch.eye(len(pairs)))

        def cost(gone: list[int], pairs: Tensor = pairs) -> float:
            return float(pairs[gone][:, gone].sum()) / 2

        gone: list[int] = []
        most, out[name] = 0.0, torch.zeros(len(pairs), dtype=torch.float64)
        while len(gone) < len(pairs):
            adds = {u: cost([*gone, u]) - cost(gone) for u in range(len(pairs)) if u not in gone}
            unit = min(adds, key=adds.get)
            most = max(most, adds[unit])
            out[name][unit] = most
            gone.append(unit)
    return out


def _weights_of(w: dict[str, Tensor], values: dict[str, Tensor], depth: int, heads: int, dim: int):
    """By group, the entries of each unit where it leaves the network, `(units, entries)`.

    The stream's are the weights and biases of the norms before its readers.
    """
    out = {}
    norms = [f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)] + ["norm", "fc_norm"]
    names = [f"{n}.{leaf}" for n in norms for leaf in ("weight", "bias")]
    out["emb"] = torch.stack([values[n] for n in names if n in values], 1)
    for i in range(depth):
        b = f"blocks.{i}."
        proj, emb = values[f"{b}attn.proj.weight"], values[f"{b}attn.proj.weight"].shape[0]
        by_head = proj.view(emb, heads, dim)
        out[f"{b}mlp"] = values[f"{b}mlp.fc2.weight"].T
        out[f"{b}heads"] = torch.stack([by_head[:, h].flatten() for h in range(heads)])
        out[f"{b}v_dim"] = torch.stack([by_head[:, :, u].flatten() for u in range(dim)])
        q = values[f"{b}attn.qkv.weight"][: heads * dim].view(heads, dim, -1)
        entries = [q[:, u].flatten() for u in range(dim)]
        if f"{b}attn.qkv.bias" in values:
            bias = values[f"{b}attn.qkv.bias"][: heads * dim].view(heads, dim)
            entries = [torch.cat([e, bias[:, u]]) for u, e in enumerate(entries)]
        norm = [values[n] for leaf in ("weight", "bias") if (n := f"{b}attn.q_norm.{leaf}") in values]
        out[f"{b}qk_dim"] = torch.stack(norm, 1) if norm else torch.stack(entries)
    return out


def taylor(w, g, depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Sum over a unit's weights of (grad · weight)²."""
    products = {name: (w[name].detach() * g[name]) ** 2 for name in g}
    return {name: t.sum(1) for name, t in _weights_of(w, products, depth, heads, dim).items()}


def magnitude(w, g, depth: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Mean over a unit's weights of weight²."""
    squares = {name: p.detach() ** 2 for name, p in w.items()}
    return {name: t.mean(1) for name, t in _weights_of(w, squares, depth, heads, dim).items()}


# --- losses -----------------------------------------------------------------------------------------------------------


def full_loss(student: list[Tensor], teacher: list[Tensor], tau: float) -> Tensor:
    """Eq. 9: sum over tokens of the batch mean of sum over classes of p_t (log p_t - log p_s), softened by tau."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        p, q = (t.double() / tau).softmax(-1), (s.double() / tau).softmax(-1)
        total = total + sum(
            sum(pi * (pi.log() - qi.log()) for pi, qi in zip(*row, strict=True)) for row in zip(p, q, strict=True)
        ) / len(p)
    return total


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of -sum over classes of target · log softmax; `target` are indices or probabilities."""
    if target.dim() == 1:
        target = F.one_hot(target, logits.shape[-1])
    return -(target.double() * logits.double().log_softmax(-1)).sum() / len(logits)


def cnn_loss(cls: Tensor, dist: Tensor | None, labels: Tensor, cnn_labels: Tensor, share: float) -> Tensor:
    """Eq. 8 weighted: the class token meets the label, the distillation token the CNN teacher's hard label."""
    second = cls if dist is None else dist
    return (1 - share) * cross_entropy(cls, labels) + share * cross_entropy(second, cnn_labels)


# --- selection --------------------------------------------------------------------------------------------------------


def drop_cheapest(scores, masks, groups, model_ms, dense_ms: float, steps: int, eta: float):
    """Try every bundle, one by one: the cheapest by saliency less latency credit leaves; a group's last one stays."""
    masks = {name: keep.clone() for name, keep in masks.items()}
    for _ in range(steps):
        best = None
        for g in groups:
            if g.name not in scores:
                continue
            kept = [i for i in range(g.size) if masks[g.name][i]]
            count = len(kept) % g.multiple or g.multiple
            if count >= len(kept):
                continue
            leaving = sorted(kept, key=lambda i, s=scores[g.name]: (float(s[i]), i))[:count]
            after = masks | {g.name: masks[g.name].clone()}
            after[g.name][leaving] = False
            cost = sum(float(scores[g.name][i]) for i in leaving)
            cost -= eta * (model_ms(masks) - model_ms(after)) / dense_ms
            if best is None or cost < best[0]:
                best = (cost, after)
        if best is None:
            break
        masks = best[1]
    return masks


# --- any host, with explicit zeros ------------------------------------------------------------------------------------


class _MaskedNorm(torch.nn.Module):
    """A host's norm whose statistics count kept channels only, on dense tensors."""

    def __init__(self, norm, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.keep, self.rms = norm, keep, "rms" in type(norm).__name__.lower()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight, getattr(self.norm, "bias", None)
        if not self.rms:
            return masked_layer_norm(x, weight, bias, self.keep, self.norm.eps)
        k = self.keep.to(x)
        return x * k / torch.sqrt(((x * k) ** 2).sum(-1, keepdim=True) / k.sum() + self.norm.eps) * weight


@torch.no_grad()
def masked_host(host, groups, masks: dict[str, Tensor]):
    """A host that was never prepared, its pruned weights set to zero and its norms counting kept channels only.

    Zero rows give zero queries, values and hidden units (the activations here are zero at zero), so the host's own
    forward pass does the rest. Changes the host.
    """
    params, keeps = dict(host.named_parameters()), {}
    for g in groups:
        for s in g.slices:
            shape = [-1 if d == s.axis else 1 for d in range(len(s.view))]
            part = params[s.name] if s.rows is None else params[s.name][s.rows[0] : s.rows[1]]
            part.copy_((part.reshape(s.view) * masks[g.name].to(part).view(shape)).view(part.shape))
            if part.dim() == 1 and s.rows is None:
                keep = (torch.ones(s.view) * masks[g.name].float().view(shape)).bool().flatten()
                keeps[s.name] = keeps.get(s.name, torch.ones_like(keep)) & keep
    for name, module in list(host.named_modules()):
        over_images = isinstance(module, torch.nn.BatchNorm2d)  # its channels are none of a stream's
        if "norm" in type(module).__name__.lower() and f"{name}.weight" in params and not over_images:
            owner, _, leaf = name.rpartition(".")
            everything = torch.ones(module.weight.numel(), dtype=torch.bool)
            setattr(host.get_submodule(owner), leaf, _MaskedNorm(module, keeps.get(f"{name}.weight", everything)))
    return host
