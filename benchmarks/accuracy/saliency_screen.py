"""Which saliency foretells best what a real DeiT-Ti can spare, one shot, without training: width by width and globally.

Every saliency is made of the same recorded gate gradients of imagenet_sample1000 (true labels, or random probes of the
model's own output). The half of imagenet_val1300 at even places chooses, by the KL divergence to the dense model, which
tells more from few images than top-1 does; the half at odd places reports the finalists. All images are the centre crop
of 224 without resizing. One kind of width shrinks until it costs as much as that share less of it would, all groups of
the kind ranked together; `all` ranks all kinds together against an analytic latency table.

The data is read from the folder that NVIT_DATA names. Recorded gradients and evaluations are kept in --cache, so that
structures can be measured by several processes at once; the run that names none of them then writes the table.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.accuracy.gate_samples import record, token_products
from benchmarks.accuracy.library import REPORTED_AT, data_folder, dense_model, images_of
from benchmarks.accuracy.paired import kl, paired_bootstrap
from benchmarks.accuracy.saliencies import candidates, score
from benchmarks.harness import Records
from nvit import adapters
from nvit.latency.table import LatencyTable
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, full_masks, kept_counts

FINALISTS = (("leave", "hessian"), ("leave", "fisher"), ("leave", "fisher, probe, toward pairs"))
SCREENED_AT = {"all": 0.8} | {kind: 0.3 for kind in KINDS}
PARTS = {"choose": slice(0, None, 2), "report": slice(1, None, 2)}
BATCH = 10


class Evaluation:
    """Per image: right or wrong, cross entropy, KL to the dense model; kept in a folder by masks."""

    def __init__(self, dense: nn.Module, groups, images: list[tuple[Tensor, int]], cache: Path) -> None:
        self.dense, self.groups, self.images, self.cache = dense, groups, images, cache
        self.answers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def _logits(self, model: nn.Module, part: str) -> Tensor:
        images = [image for image, _ in self.images[PARTS[part]]]
        return torch.cat([model(torch.stack(images[i : i + BATCH])) for i in range(0, len(images), BATCH)])

    def _dense_logits(self, part: str) -> Tensor:
        if part not in self.answers:
            file = self.cache / f"dense_{part}.safetensors"
            if not file.exists():
                save_file({"logits": self._logits(self.dense, part)}, file)
            self.answers[part] = load_file(file)["logits"]
        return self.answers[part]

    def __call__(self, masks: Masks, part: str) -> dict[str, np.ndarray]:
        bits = b"".join(n.encode() + np.packbits(masks[n].numpy()).tobytes() for n in sorted(masks))
        file = self.cache / f"{part}_{hashlib.sha1(bits).hexdigest()[:16]}.npz"
        if not file.exists():
            logits, dense = self._logits(compact(self.dense, self.groups, masks), part), self._dense_logits(part)
            labels = torch.tensor([label for _, label in self.images[PARTS[part]]])
            found = {
                "right": logits.argmax(-1) == labels,
                "loss": nn.functional.cross_entropy(logits, labels, reduction="none"),
                "kl": kl(dense, logits),
            }
            np.savez(file, **{name: t.numpy() for name, t in found.items()})
        with np.load(file) as f:
            return dict(f)


def _columns(found: dict[str, np.ndarray], name: str) -> dict[str, float]:
    top1, loss, kl = (float(found[key].mean()) for key in ("right", "loss", "kl"))
    return {f"top1_{name}": 100 * top1, f"loss_{name}": loss, f"kl_{name}": kl}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("saliency-cache"), help="folder for what was measured")
    parser.add_argument("--quick", action="store_true", help="60 images of each set, MLP alone, nothing written")
    parser.add_argument("--structures", nargs="+", choices=list(REPORTED_AT), help="only these, nothing written")
    parser.add_argument("--no-report", action="store_true", help="only the screening, nothing written")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    root = data_folder()
    torch.set_num_threads(args.threads)
    records = Records("saliency_screen")
    cache = args.cache / "quick" if args.quick else args.cache
    cache.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    dense = dense_model(root)
    few = slice(60 if args.quick else None)
    file = cache / "gates.safetensors"
    if not file.exists():
        scored, start = images_of(root / "imagenet_sample1000" / "val", dense, None)[few], time.process_time()
        found = record(copy.deepcopy(dense), scored, lambda n: print(f"recorded {n} of {len(scored)}", file=sys.stderr))
        prepared = copy.deepcopy(dense)
        adapters.find(prepared).prepare(prepared)
        save_file(found | token_products(prepared, [image for image, _ in scored]), file)
        print(f"{time.process_time() - start:.0f} CPU seconds for {len(scored)} images", file=sys.stderr)
    samples = load_file(file)

    images = images_of(root / "imagenet_val1300", dense, root / "imagenet_synsets.txt")[few]
    table, adapter = LatencyTable.analytic(dense), adapters.find(dense)
    groups = adapter.groups(adapter.prepare(dense))
    evaluate, full = Evaluation(dense, groups, images, cache), full_masks(groups)

    def masks_of(kind: str, share: float, place: str, name: str) -> Masks:
        """For `all`, `share` is the latency target; else the share of the kind's widths that leaves."""
        if kind == "all":
            scores, target = {}, share * table.dense_ms
            for k in KINDS:
                scores |= score(samples, k, place, name)
        else:
            scores = score(samples, kind, place, name)
            target = table.model_ms([replace(b, **{kind: getattr(b, kind) * (1 - share)}) for b in table.dense])
        return drop_to_target(scores, full, groups, table, target)[0]

    def reported(kind: str, share: float) -> None:
        base = None
        for place, name in FINALISTS:
            masks = masks_of(kind, share, place, name)
            chosen, report = evaluate(masks, "choose"), evaluate(masks, "report")
            base = base or report
            gain, kl = (paired_bootstrap(report[key], base[key]) for key in ("right", "kl"))
            kept = kept_counts(masks)
            mean = {k: np.mean([kept[g.name] for g in groups if g.kind == k]) for k in KINDS}
            records.add(
                stage="report",
                structure=kind,
                gate=place,
                saliency=name,
                fraction=share,
                images=len(report["kl"]),
                **_columns(chosen, "choose"),
                **_columns(report, "report"),
                top1_over_hessian=100 * gain.mean,
                low=100 * gain.low,
                high=100 * gain.high,
                kl_over_hessian=kl.mean,
                kl_low=kl.low,
                kl_high=kl.high,
                **{f"kept_{k}": float(v) for k, v in mean.items()},
            )

    structures = args.structures or (["mlp"] if args.quick else list(REPORTED_AT))
    for kind in structures:
        for place, name in () if args.quick else candidates(kind):
            share = SCREENED_AT[kind]
            found = evaluate(masks_of(kind, share, place, name), "choose")
            row = {"stage": "screen", "structure": kind, "gate": place, "saliency": name, "fraction": share}
            records.add(**row, images=len(found["kl"]), **_columns(found, "choose"))
    for kind in structures:
        for share in () if args.no_report else (0.5,) if args.quick else REPORTED_AT[kind]:
            reported(kind, share)
    if not (args.quick or args.structures or args.no_report):
        records.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
