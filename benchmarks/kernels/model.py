"""A training step and an inference pass of DeiT-B, dense, masked and compact: eager, compiled and fused.

    python -m benchmarks.kernels.model

Masked models keep 75, 50 and 35 % of heads and hidden units through kept lists; compact ones have the same units cut
out of timm's own modules. DeiT-Ti at two images on a CPU, where the fused layers run their references.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.harness import Case, Row, device, measure, run
from nvit_kernels import fuse

KEPT = (0.75, 0.5, 0.35)


def masks_of(model: nn.Module, fraction: float) -> dict[str, torch.Tensor]:
    """The first units of each head and hidden width; which ones does not matter for speed."""
    there, masks = next(model.parameters()).device, {}
    for i, block in enumerate(model.blocks):
        heads, hidden = block.attn.num_heads, block.mlp.fc1.out_features
        masks[f"blocks.{i}.heads"] = torch.arange(heads, device=there) < max(1, round(fraction * heads))
        masks[f"blocks.{i}.mlp"] = torch.arange(hidden, device=there) < 16 * round(fraction * hidden / 16)
    return masks


def cut(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    """The same model with what `masks` prunes cut out of its modules."""
    model = copy.deepcopy(model)

    def keep(linear: nn.Linear, rows=None, columns=None):
        weight = linear.weight.data
        weight = weight if rows is None else weight[rows]
        linear.weight = nn.Parameter((weight if columns is None else weight[:, columns]).contiguous())
        if rows is not None and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows])
        linear.out_features, linear.in_features = linear.weight.shape

    for i, block in enumerate(model.blocks):
        attn, heads, hidden = block.attn, masks[f"blocks.{i}.heads"], masks[f"blocks.{i}.mlp"]
        dims = heads.repeat_interleave(attn.head_dim)
        attn.num_heads, attn.attn_dim = int(heads.sum()), int(dims.sum())
        keep(attn.qkv, rows=dims.repeat(3))
        keep(attn.proj, columns=dims)
        keep(block.mlp.fc1, rows=hidden)
        keep(block.mlp.fc2, columns=hidden)
    return model


def passes(model: nn.Module, x: torch.Tensor, dtype: torch.dtype):
    """(inference, training step without the optimizer), each returning what can be compared."""
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    first = next(model.parameters())

    def amp():
        return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)

    def inference():
        with torch.no_grad(), amp():
            return model(x)

    def step():
        model.zero_grad(set_to_none=True)
        with amp():
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        return loss.detach().reshape(1), first.grad

    return inference, step


def cases() -> list[tuple[Case, int]]:
    """Each case with its number of images."""
    import timm

    there = device()
    gpu = there.type == "cuda"
    name, batch, dtype = ("deit_base", 128, torch.bfloat16) if gpu else ("deit_tiny", 2, torch.float32)
    torch.manual_seed(0)
    dense = timm.create_model(f"{name}_patch16_224").to(there).eval()
    x, made = torch.randn(batch, 3, 224, 224, device=there), []
    for fraction in (1.0, *KEPT):
        masks = masks_of(dense, fraction)
        compact = cut(dense, masks)
        models = {"timm, compact": compact, "nvit fused, compact": fuse(copy.deepcopy(compact))}
        if fraction == 1.0:
            models = {"timm, dense": dense, "nvit fused, dense": fuse(copy.deepcopy(dense))}
        else:
            models["nvit fused, masked"] = fuse(copy.deepcopy(dense), masks)
        if gpu:
            models |= {f"{label}, torch.compile": torch.compile(model) for label, model in list(models.items())}
        exact = passes(compact, x, torch.float32)
        kinds = {"inference": 0, "training step": 1}
        for kind, which in kinds.items():
            calls = {label: passes(model, x, dtype)[which] for label, model in models.items()}
            # 16-bit logits of an untrained model: the gate is there to catch a wrong model, not a rounding
            case = Case(f"{name} {kind} b{batch}, {fraction:.0%} of heads and hidden", calls, exact[which],
                        error=0.15 if gpu else 1e-3)  # fmt: skip
            made.append((case, batch))
    return made


def rows() -> Iterator[Row]:
    """Rows whose note has images/s and, on a GPU, where providers therefore run one by one, peak memory."""
    gpu = device().type == "cuda"
    for case, images in cases():
        for calls in [{p: call} for p, call in case.providers.items()] if gpu else [case.providers]:
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for row in measure(replace(case, providers=calls)):
                note = row.note if row.median_ms is None else f"{1e3 * images / row.median_ms:.1f} images/s"
                yield replace(row, note=note + (f", peak {torch.cuda.max_memory_allocated() >> 20} MiB" if gpu else ""))


if __name__ == "__main__":
    run(measured=rows())
