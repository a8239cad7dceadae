"""Top-1 of a real DeiT-Ti when its least salient MLP units are gone, by criterion; no training.

Every criterion scores the same shuffled batches of imagenet_sample1000 in one pass; the share of units to remove is
turned into a target of an analytic latency table, in which every MLP unit costs the same. Top-1 on imagenet_val1300,
the centre cropped without resizing. The data is read from the folder that NVIT_DATA names.

`hessian` squares a batch's sum, so which images share a batch matters: it is also scored for other orders of the same
images, from the samples' gate gradients of that one pass, and its mean over orders is what the target is held against.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.accuracy.library import data_folder, dense_model, images_of
from benchmarks.harness import Records
from nvit import adapters, data
from nvit.analysis.evaluate import accuracy
from nvit.criteria.base import Evidence, RunningMean
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.latency.table import LatencyTable
from nvit.prune.pruner import prunable_groups
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks

TARGETS = {("hessian", 0.3): 73.0, ("hessian", 0.5): 50.0}


def scores(model: nn.Module, groups, loader, labels: Tensor, criteria: list[str], seed: int):
    """Mean saliency by criterion from one pass of cross entropy, and every sample's gate gradients by group."""
    params, means = dict(model.named_parameters()), {name: RunningMean() for name in criteria}
    samples = {g.name: torch.empty(len(labels), g.size) for g in groups}
    with GateRecorder(model, groups, full_masks(groups)) as recorder:
        for images, index in loader:
            nn.functional.cross_entropy(model(images), labels[index]).backward()
            gates = recorder.pop()
            seen = Evidence(params, {n: p.grad for n, p in params.items()}, gates, seed)
            for name, mean in means.items():
                mean.update(CRITERIA[name].score(groups, seen))
            for name, gate in gates.items():
                samples[name][index] = gate
            model.zero_grad(set_to_none=True)
    return {name: CRITERIA[name].scores(mean.value()) for name, mean in means.items()}, samples


def hessian_again(groups, samples: dict[str, Tensor], batch_size: int, seed: int) -> dict[str, Tensor]:
    """Hessian scores of another order of the same samples."""
    mean, indices = RunningMean(), [(i, i) for i in range(len(next(iter(samples.values()))))]
    for index, _ in data.TrainingData(indices, batch_size, seed):
        seen = Evidence({}, gates={name: gate[index] for name, gate in samples.items()})
        mean.update(CRITERIA["hessian"].score(groups, seen))
    return mean.value()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--shares", nargs="+", type=float, default=(0.3, 0.5), help="of all MLP units, removed")
    parser.add_argument("--batch-size", type=int, default=50, help="of scoring")
    parser.add_argument("--orders", type=int, default=5, help="of the images, seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    root = data_folder()
    torch.set_num_threads(args.threads)
    records = Records("saliency")

    dense = dense_model(root)
    start = time.perf_counter()
    training = images_of(root / "imagenet_sample1000" / "val", dense, None)
    evaluation = data.evaluation_loader(
        images_of(root / "imagenet_val1300", dense, root / "imagenet_synsets.txt"), batch_size=50
    )
    table = LatencyTable.analytic(dense)
    adapter = adapters.find(dense)
    groups = adapter.groups(adapter.prepare(dense))
    free = prunable_groups(groups, only=("mlp",), freeze=())
    units = sum(g.size for g in free)

    def record(criterion: str, share: float, model: nn.Module, seconds: float, order: int = 0) -> float:
        found = accuracy(model, evaluation)
        records.add(
            case=criterion,
            removed=share,
            top1=found["top1"],
            top5=found["top5"],
            order=order,
            images=found["images"],
            scored_images=len(training) if criterion != "dense" else None,
            seconds=seconds,
        )
        return found["top1"]

    record("dense", 0.0, dense, time.perf_counter() - start)
    start = time.perf_counter()
    labels = torch.tensor([label for _, label in training])
    by_index = [(image, i) for i, (image, _) in enumerate(training)]
    loader = data.TrainingData(by_index, args.batch_size, seed=0)
    by_criterion, samples = scores(dense, free, loader, labels, args.criteria, seed=0)
    scoring = time.perf_counter() - start
    found = [(name, 0, saliency) for name, saliency in by_criterion.items()]
    if "hessian" in by_criterion:
        found += [("hessian", k, hessian_again(free, samples, args.batch_size, k)) for k in range(1, args.orders)]
    top1: dict[tuple[str, float], list[float]] = {}
    for criterion, order, saliency in found:
        for share in args.shares:
            target_ms = table.model_ms([replace(b, mlp=b.mlp * (1 - share)) for b in table.dense])
            masks, _ = drop_to_target(saliency, full_masks(groups), groups, table, target_ms)
            masked = copy.deepcopy(dense)
            apply_(masked, groups, masks)
            small = compact(masked, groups, masks)
            gone = sum(int((~masks[g.name]).sum()) for g in free)
            with torch.inference_mode():
                x = evaluation.dataset[0][0][None]
                ours = masked(x)
                same = torch.allclose(ours, small(x), rtol=0, atol=1e-5 * float(ours.abs().max()))
            if not same or not share * units <= gone <= share * units + 16:
                print(f"{criterion}: {gone} of {units} units are gone; masked equals compact: {same}", file=sys.stderr)
                return 1
            top1.setdefault((criterion, share), []).append(record(criterion, share, small, scoring, order))
    for (criterion, share), target in TARGETS.items():
        if reached := top1.get((criterion, share)):
            mean = statistics.mean(reached)
            case = f"{criterion}, mean of {len(reached)} orders"
            records.add(case=case, removed=share, top1=mean, target_top1=target, met=mean >= target)
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
