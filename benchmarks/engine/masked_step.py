"""Forward and backward of a masked model against its compact twin and the dense model: cost follows what is kept.

Half the units of each kind are kept at random, in whole bundles; a group with an odd number of bundles keeps one more
or one less than half in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys

import timm
import torch
from torch import Tensor, nn

from benchmarks.engine.library import half_masks
from benchmarks.harness import Records
from benchmarks.timing import cpu_seconds, median_ratio
from nvit import adapters
from nvit.structure.compact import compact, cut
from nvit.structure.masks import apply_

TARGET = 1.15


def wrong(masked: nn.Module, twin: nn.Module, weights, images: Tensor) -> str | None:
    """What differs between a masked model and its compact twin, or None."""
    outputs = []
    for model in (masked, twin):
        outputs.append(model(images))
        outputs[-1].square().sum().backward()
    if not torch.allclose(*outputs, rtol=0, atol=1e-5 * float(outputs[1].detach().abs().max())):
        return "outputs differ"
    grads = {name: p.grad for name, p in masked.named_parameters()}
    narrow = cut(grads, weights)
    for name, p in twin.named_parameters():
        if not torch.allclose(narrow[name], p.grad, rtol=0, atol=1e-4 * float(p.grad.abs().max())):
            return f"gradients of {name} differ"
    if any(int(grads[n].count_nonzero()) != int(narrow[n].count_nonzero()) for n in narrow):
        return "a pruned weight has a gradient"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = Records("masked_step")

    dense = timm.create_model(args.model).eval()
    for p in dense.parameters():
        nn.init.normal_(p, std=0.02)
    adapter = adapters.find(dense)
    masked = adapter.prepare(copy.deepcopy(dense))
    groups = adapter.groups(masked)
    masks = half_masks(groups, torch.Generator().manual_seed(0))
    weights = apply_(masked, groups, masks)
    twin = compact(masked, groups, masks).eval()
    images = torch.randn(args.batch_size, *dense.pretrained_cfg["input_size"])
    if error := wrong(masked, twin, weights, images):
        print(f"the masked model is not its compact twin: {error}", file=sys.stderr)
        return 1

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    models = {"masked": masked, "compact": twin, "dense": dense}
    seconds = cpu_seconds({name: lambda m=m: step(m) for name, m in models.items()}, args.rounds)
    for name, times in seconds.items():
        records.add(
            case=name,
            model=args.model,
            batch_size=args.batch_size,
            cpu_ms=1e3 * statistics.median(times),
            over_compact=median_ratio(times, seconds["compact"]),
            over_dense=median_ratio(times, seconds["dense"]),
            target_over_compact=TARGET if name == "masked" else None,
        )
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
