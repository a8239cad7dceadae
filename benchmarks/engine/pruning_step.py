"""One pruning step with gradients given: score, select, apply, against Torch-Pruning 1.6 (Taylor importance).

Both get the same weights and gradients, and remove the same share of the model's multiply-accumulates: what
Torch-Pruning's `step()` removes becomes our target. Ours is `Pruner.observe`, one decision, and the masks applied;
`ours, compact` adds the cut model, as Torch-Pruning's step cuts. Building its dependency graph and preparing our model
happen once for many steps and are given apart. CPU seconds of one process, in turn; peak memory is what the step adds
to the resident memory of a forked child of its own. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

from benchmarks.engine.torch_pruning_vit import finish, pruner_of, twin_of
from benchmarks.harness import Records
from benchmarks.timing import median_ratio, peak_mib
from nvit.analysis.evaluate import macs
from nvit.latency.table import LatencyTable
from nvit.prune.pruner import Pruner
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import widths

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
INPUT = (3, 224, 224)


def with_gradients(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def our_step(pruner: Pruner, target: float) -> None:
    pruner.observe()
    table = pruner.table
    masks, _ = drop_to_target(pruner.mean.value(), pruner.masks, pruner.groups, table, target * table.dense_ms)
    pruner._set_masks(masks)


def ours_ready(model: nn.Module, table: LatencyTable, target: float, cut: bool) -> Callable[[], object]:
    pruner = Pruner(model, table)

    def step() -> Pruner:
        our_step(pruner, target)
        if cut:
            pruner.small = pruner.compact()
        return pruner

    return step


def gate(dense: nn.Module, small: nn.Module, pruner: Pruner, share: float) -> str | None:
    """What is wrong with the two results, or None."""
    images = torch.randn(2, *INPUT)
    with torch.no_grad():
        if small(images).shape != (2, dense.num_classes):
            return "Torch-Pruning's model does not run"
        ours, twin = pruner.model(images), pruner.compact()
        if not torch.allclose(ours, twin(images), rtol=0, atol=1e-5 * float(ours.abs().max())):
            return "our masked model is not its compact twin"
    for block, w in zip(twin.blocks, widths(pruner.groups, pruner.masks), strict=True):
        shapes = ((w.heads * (2 * w.qk_dim + w.v_dim), w.emb), (w.mlp, w.emb))
        if (tuple(block.attn.qkv.weight.shape), tuple(block.mlp.fc1.weight.shape)) != shapes:
            return f"our compact model does not have the widths {w}"
    if pruner.ratio > share or macs(twin, INPUT) > 1.02 * macs(small, INPUT):
        return f"ours keeps {pruner.ratio:.3f} of the work, Torch-Pruning's {share:.3f}"
    return None


def timed(call: Callable, *args) -> tuple[float, object]:
    start = time.process_time()
    result = call(*args)
    return time.process_time() - start, result


def compare(records: Records, name: str, ratio: float, rounds: int) -> str | None:
    dense = with_gradients(name)
    table = LatencyTable.analytic(dense)
    seconds: dict[str, list[float]] = {}
    share = 0.0
    for _ in range(rounds):
        model = twin_of(dense)
        graph_s, pruner = timed(pruner_of, model, ratio)
        step_s, _ = timed(pruner.step)
        small = finish(model, pruner)
        share = share or macs(small, INPUT) / macs(dense, INPUT)
        row = {"torch-pruning": step_s, "torch-pruning, graph": graph_s}
        for case, cut in (("ours", False), ("ours, compact", True)):
            row[f"{case}, preparation"], step = timed(ours_ready, twin_of(dense), table, share, cut)
            row[case], masked = timed(step)
        if not seconds and (error := gate(dense, small, masked, share)):
            return f"{name}: {error}"
        for case, s in row.items():
            seconds.setdefault(case, []).append(s)
        del model, pruner, small, masked, step
    memory = {
        "torch-pruning": peak_mib(lambda: pruner_of(twin_of(dense), ratio).step),
        "ours": peak_mib(lambda: ours_ready(twin_of(dense), table, share, False)),
        "ours, compact": peak_mib(lambda: ours_ready(twin_of(dense), table, share, True)),
    }
    for case, times in seconds.items():
        is_step = case in memory
        records.add(
            case=case,
            model=name,
            pruning_ratio=ratio,
            macs_kept=share,
            cpu_ms=1e3 * statistics.median(times),
            times_faster=median_ratio(seconds["torch-pruning"], times) if is_step else None,
            peak_mib=memory.get(case),
            memory_over_torch_pruning=memory[case] / memory["torch-pruning"] if is_step else None,
        )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.05, 0.5), help="Torch-Pruning's pruning_ratio")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = Records("pruning_step")
    for name in args.models:
        for ratio in args.ratios:
            if error := compare(records, name, ratio, args.rounds):
                print(error, file=sys.stderr)
                return 1
    records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
