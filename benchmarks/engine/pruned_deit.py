"""DeiT-B cut to widths like NViT-B, H, S and T: latency predicted by a table, and measured; bf16, batch 256 on a GPU.

    python -m benchmarks.engine.pruned_deit [--batch-size 256]

The same widths in every block, which gives 33, 30, 20 and 6.5 M parameters, as the paper's four have. On a GPU a
measurement is a replay of a CUDA graph. The table is measured first, on the same device; its error is that of the ratio
to dense. `speed_up` is over timm's own dense model. Writes <GPU>_pruned_deit.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.engine.library import TINY, WIDTHS, Setting, first_line, uniform
from benchmarks.harness import Records, relative_error
from benchmarks.timing import timings
from nvit import adapters
from nvit.analysis.evaluate import parameters
from nvit.latency.table import LatencyTable
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, apply_, full_masks, widths


@torch.inference_mode()
def wrong(dense: nn.Module, groups, masks: Masks, kept: tuple[int, ...], images: Tensor) -> str | None:
    """What is wrong with a cut model, or None: its widths, or that it is not the masked model's twin; on the CPU."""
    found = {tuple(getattr(w, kind) for kind in KINDS) for w in widths(groups, masks)}
    if found != {kept}:
        return f"its widths are {sorted(found)}, not {kept}"
    masked = copy.deepcopy(dense).cpu()
    small = compact(masked, groups, masks).eval()
    apply_(masked, groups, masks)
    few = images[:2].cpu().float()
    error = relative_error(small(few), masked(few))
    return None if error < 1e-4 else f"its logits are {error:.1e} of the largest from the masked model's"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--table-seconds", type=float, default=15.0)
    parser.add_argument("--seconds", type=float, default=1.0, help="a model")
    parser.add_argument("--tiny", action="store_true", help="two small blocks on a CPU, to try every line")
    parser.add_argument("--out", type=Path, help="folder of the CSV; benchmarks/results by default")
    args = parser.parse_args()
    setting = Setting.of(args.tiny, args.batch_size)
    dtype = setting.amp or torch.float32
    records = Records("pruned_deit", setting.device, args.out)
    dense = setting.create()
    images = setting.batch(dense)[0].to(dtype)
    plain = setting.create().to(dtype)

    start = time.perf_counter()
    table = LatencyTable.measure(dense, setting.batch_size, setting.device, dtype, seconds=args.table_seconds)
    table_s = time.perf_counter() - start

    adapter = adapters.find(dense)
    groups = adapter.groups(adapter.prepare(dense))
    cuts = {"dense": full_masks(groups)}
    chosen = TINY if args.tiny else WIDTHS
    cuts |= {name: uniform(groups, kept) for name, kept in chosen.items()}
    models = {name: compact(dense, groups, masks).eval().to(setting.device, dtype) for name, masks in cuts.items()}
    for name, kept in chosen.items():
        if reason := wrong(dense, groups, cuts[name], kept, images):
            print(f"{name}: the cut model is wrong: {reason}", file=sys.stderr)
            return 1

    def forward(model: nn.Module):
        def call() -> Tensor:
            with torch.inference_mode():
                return model(images)

        return call

    failed, measured = 0, {}
    for name, model in {"timm dense": plain, **models}.items():
        row = {"case": name, "batch_size": len(images), "dtype": str(dtype)[6:], "parameters": parameters(model)}
        try:
            timing = timings({name: forward(model)}, args.seconds)[name]
        except Exception as broken:  # the other models are measured all the same
            failed += 1
            records.add(**row, note=first_line(broken))
            continue
        ms = measured[name] = timing.ms[0]
        row |= {"measured_ms": ms, "p20_ms": timing.ms[1], "p80_ms": timing.ms[2]}
        row |= {"host_ms": timing.host_ms and timing.host_ms[0], "images_per_s": 1e3 * len(images) / ms}
        row["speed_up"] = measured["timm dense"] / ms if "timm dense" in measured else None
        if name in cuts:
            predicted = table.model_ms(widths(groups, cuts[name]))
            row |= {"predicted_ms": predicted, "predicted_ratio": predicted / table.dense_ms, "table_s": table_s}
            if "dense" in measured:
                row["measured_ratio"] = ms / measured["dense"]
                row["ratio_error"] = row["predicted_ratio"] / row["measured_ratio"] - 1
        records.add(**row, note=timing.note)
        records.save()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
