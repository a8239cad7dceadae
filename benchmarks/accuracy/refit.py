"""Accuracy of DeiT-Ti pruned in one shot, with and without a closed-form refit, no training.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.refit [mlp kinds global images labels] [--images 256]

`mlp`: 30 and 50 % of all hidden units by several criteria. `kinds`: each kind of width alone, 10 to 50 % of the units
of every group. `global`: all structures to four analytic latencies. `images`: calibration sets of several sizes.
`labels`: the same refit after choices that read true labels, drawn ones, the model's own answer, or none. The row of a
refit has the gain over the same choice without one, with its 95 % interval (paired bootstrap over images). Settings of
the refit were tried on 400 of the 1300 evaluation images; `fresh` columns are of the other 900. Writes
benchmarks/results/refit_<section>_cpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from torch import Tensor

from benchmarks.accuracy.library import BATCH, Bench, answers, data_folder, in_every_group, ranked_together
from benchmarks.accuracy.paired import paired_bootstrap
from benchmarks.harness import Records
from nvit.config import PruneConfig
from nvit.prune.pruner import Pruner
from nvit.prune.scoring import score
from nvit.selection.lagrangian import drop_to_target
from nvit.spec import KINDS
from nvit.structure.masks import Masks, full_masks, kept_counts, widths
from nvit.utils.memory import most_held

SECTIONS = ("mlp", "kinds", "global", "images", "labels")
TARGETS = (0.9, 0.8, 0.65, 0.5)
EVALUATED, TRIED_ON = 1300, 400


def fresh(right: Tensor) -> Tensor:
    """Answers of the images on which no setting was tried; none where not all images were evaluated."""
    order = torch.randperm(EVALUATED, generator=torch.Generator().manual_seed(2))
    return right[order[TRIED_ON:]] if len(right) == EVALUATED else right[:0]


def _top1(right: Tensor) -> dict[str, float]:
    return {"top1": 100 * float(right.mean())} | (
        {"top1_fresh": 100 * float(fresh(right).mean())} if len(fresh(right)) else {}
    )


class RefitBench(Bench):
    """Rows of every section."""

    def begin(self, section: str) -> None:
        self.records = Records(f"refit_{section}")
        self.records.add(case="dense", **_top1(self.dense))

    def by(self, criterion: str, batches=None, labels: str = "true") -> dict[str, Tensor]:
        if criterion == "remaining":
            return self.remaining()
        config = PruneConfig(train=False, criterion=criterion, labels=labels)
        pruner = Pruner(copy.deepcopy(self.model), self.table, config)
        score(pruner, batches or self.calibration)
        return pruner.scores()

    def compare(self, masks: Masks, *, batches=None, **row) -> None:
        """Rows of one choice, without and with a refit."""
        batches = batches or self.calibration
        right = {}
        for refitted in (False, True):
            start = time.process_time()
            small = self.pruned(masks, refit=refitted, batches=batches)
            seconds = time.process_time() - start
            right[refitted] = answers(small, self.evaluation)
            more = {}
            if refitted:
                d = paired_bootstrap(right[True].tolist(), right[False].tolist())
                more = {"gain": 100 * d.mean, "low": 100 * d.low, "high": 100 * d.high, "cpu_s": seconds}
                if len(fresh(right[True])):
                    d = paired_bootstrap(*(fresh(right[way]).tolist() for way in (True, False)))
                    more |= {"gain_fresh": 100 * d.mean, "low_fresh": 100 * d.low, "high_fresh": 100 * d.high}
                more["peak_mib"] = most_held(torch.device("cpu")) / 2**20
            top1 = _top1(right[refitted])
            self.records.add(**row, refit=refitted, **top1, images=sum(len(x) for x, _ in batches), **more)
        self.records.save()

    def mlp(self) -> None:
        for criterion in ("remaining", "fisher"):
            scores = self.by(criterion)
            for share in (0.3, 0.5):
                masks = ranked_together(self.groups, scores, "mlp", share)
                self.compare(masks, case="mlp", criterion=criterion, removed=share)

    def kinds(self) -> None:
        scores = self.remaining()
        for kind in KINDS:
            for share in (0.3333,) if kind == "heads" else (0.1, 0.2, 0.3, 0.5):
                masks = in_every_group(self.groups, scores, kind, share)
                self.compare(masks, case=kind, criterion="remaining", removed=share)

    def globally(self, targets=TARGETS, batches=None, scores=None, criterion: str = "remaining", **row) -> None:
        scores = scores or self.remaining()
        for target in targets:
            masks, _ = drop_to_target(
                scores, full_masks(self.groups), self.groups, self.table, target * self.table.dense_ms
            )
            emb = kept_counts(masks)["emb"]
            macs = self.table.ratio(widths(self.groups, masks))
            row |= {"case": "global", "criterion": criterion, "target": target, "macs": macs, "emb": emb}
            self.compare(masks, batches=batches, **row)

    def images(self) -> None:
        every = [torch.cat(t) for t in zip(*self.calibration, strict=True)]
        for count in (64, 256, 1000):
            batches = -(-count // BATCH)
            part = list(zip(*(t[:count].tensor_split(batches) for t in every), strict=True))
            self.model, self.seen = self.rotated(part)
            self.globally((0.65,), part)

    @torch.inference_mode()
    def labels(self) -> None:
        own = [(x, self.plain(x).argmax(-1)) for x, _ in self.calibration]
        self.globally((0.65,), labels="none")
        for labels, batches in (("true", self.calibration), ("sampled", self.calibration), ("argmax", own)):
            with torch.inference_mode(False), torch.enable_grad():
                batches = [(x.clone(), y.clone()) for x, y in batches]
                scores = self.by("fisher", batches, "sampled" if labels == "sampled" else "true")
            self.globally((0.65,), scores=scores, criterion="fisher", labels=labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; by default {', '.join(SECTIONS[:3])}")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--eval-images", type=int, default=0, help="evaluation images; 0 for all")
    args = parser.parse_args()
    if unknown := set(args.sections).difference(SECTIONS):  # `choices` refuses an empty list before Python 3.12
        parser.error(f"unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    root = data_folder()
    torch.set_num_threads(1)
    bench = RefitBench(root, args.images, args.eval_images)
    for section in args.sections or SECTIONS[:3]:
        bench.begin(section)
        {"global": bench.globally}.get(section, getattr(bench, section, None))()
    return 0


if __name__ == "__main__":
    sys.exit(main())
