"""Scoring one batch without weight gradients against scoring it from them, the same saliency either way.

`weights` is `loss.backward()` and the sums of `grad * weight`; `activations` freezes the weights and reads the gates in
the backward pass. CPU seconds of one process, in turn; peak memory is what one batch adds, in a forked child of its
own, to what is resident once the model is built, with an allocator that gives freed memory back at once (as it does
under a budget), for both alike. Nothing is timed unless both routes give the same scores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Records
from benchmarks.timing import cpu_seconds, median_ratio, peak_mib
from nvit import adapters
from nvit.criteria.base import Evidence
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.structure.masks import full_masks
from nvit.utils.memory import keep_freed_memory

FASTER, MEMORY = 1.25, 0.8
"""Targets: times faster, share of the peak memory."""


def routes(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
    """Both ways to the `hessian` saliency of one batch."""
    groups, params = adapters.find(model).groups(model), dict(model.named_parameters())
    masks, hessian = full_masks(groups), CRITERIA["hessian"].score

    def from_weights() -> Mapping[str, Tensor]:
        model.requires_grad_(True)
        F.cross_entropy(model(images), labels).backward()
        scores = hessian(groups, Evidence(params, {n: p.grad for n, p in params.items() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
        return scores

    def from_activations() -> Mapping[str, Tensor]:
        model.requires_grad_(False)
        with GateRecorder(model, groups, masks) as gates:
            F.cross_entropy(model(images), labels).backward()
        return hessian(groups, Evidence(params, {}, gates.pop()))

    return {"weights": from_weights, "activations": from_activations}


def wrong(calls: Mapping[str, Callable[[], Mapping[str, Tensor]]]) -> str | None:
    """The group whose scores differ by more than fp32 sums over a batch explain, or None."""
    expected, got = (calls[name]() for name in ("weights", "activations"))
    for name, scores in expected.items():
        if float((got[name] - scores).abs().max()) > 1e-3 * float(scores.max()):
            return name
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory(False)
    records = Records("scoring")
    model = timm.create_model(args.model).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    adapters.find(model).prepare(model)
    images = torch.randn(args.batch_size, *model.pretrained_cfg["input_size"])
    calls = routes(model, images, torch.randint(model.num_classes, (args.batch_size,)))
    memory = {name: peak_mib(lambda call=call: call) for name, call in calls.items()}
    if name := wrong(calls):
        print(f"the two routes disagree on {name}", file=sys.stderr)
        return 1
    seconds = cpu_seconds(calls, args.rounds)
    for name, times in seconds.items():
        ours = name == "activations"
        records.add(
            case=name,
            model=args.model,
            batch_size=args.batch_size,
            cpu_s=statistics.median(times),
            times_faster=median_ratio(seconds["weights"], times),
            peak_mib=memory[name],
            memory_ratio=memory[name] / memory["weights"],
            target_faster=FASTER if ours else None,
            target_memory=MEMORY if ours else None,
        )
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
