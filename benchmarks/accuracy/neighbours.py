"""DeiT-Ti without training at the settings of published neighbours: what is left of its accuracy, theirs quoted beside.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.neighbours [SETTING …] [--images 300]

`nvit`: the share of each kind of width that the setting names leaves, units of a kind ranked together by the loss that
remains after a refit, then the refit, as `nvit prune --no-train --refit` does it; where tokens merge, nvit's merge, and
(`nvit, widths too`) widths to 0.9 of the multiply-accumulates beneath fewer merged tokens, at the same cost in all.
`VBP's rule, here`: the hidden units of least variance leave and their means go into the next bias (arXiv:2507.12988),
on the same images, which are easier than all of ImageNet's validation set: it says what a retention is worth here.
Calibration on images of imagenet_sample1000, labels unread; all of imagenet_val1300 is evaluated, cropped without
resizing. `retention` is top-1 as a share of the dense model's on the same images, with its 95 % interval (bootstrap
over images). `knn`: with the 1000 images as the bank, one a class, at SnapViT's settings. Published rows are quoted,
not measured (`benchmarks.accuracy.published`). Rows go into neighbours_cpu.csv, and are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.accuracy.library import (
    BATCH,
    Bench,
    answers,
    data_folder,
    images_of,
    ranked_together,
    without_head,
)
from benchmarks.accuracy.paired import bits, ratio_bootstrap
from benchmarks.accuracy.published import QUOTES
from benchmarks.accuracy.rows import Resumed
from nvit import adapters
from nvit.analysis.compare import size
from nvit.analysis.neighbours import Bank, features_of, knn, percent
from nvit.criteria.gauss_newton import places_of
from nvit.prune.tokens import schedules, work_of
from nvit.selection.lagrangian import drop_to_target
from nvit.selection.schedules import FAMILIES
from nvit.structure.compact import compact
from nvit.structure.masks import Masks, apply_, full_masks

SETTINGS: dict[str, dict[str, float]] = {
    "20 % of MLP": {"mlp": 0.2},
    "half of MLP": {"mlp": 0.5},
    "half of QK": {"qk_dim": 0.5},
    "half of MLP and QK": {"mlp": 0.5, "qk_dim": 0.5},
    "35 % of MLP, 20 % of heads": {"mlp": 0.35, "heads": 0.2},
    "55 % of MLP, 40 % of heads": {"mlp": 0.55, "heads": 0.4},
    "8 tokens a block": {"tokens": 8},
    "12 tokens a block": {"tokens": 12},
    "16 tokens a block": {"tokens": 16},
}
"""The share of each kind of width that leaves, or how many tokens merge in every block."""

WIDTHS_FIRST = 0.9
"""Of the multiply-accumulates, where widths leave beneath merged tokens: what `nvit prune --only widths tokens` took at
half of them (tokens_cpu.csv)."""


def chosen(bench: Bench, scores: Mapping[str, Tensor], shares: Mapping[str, float]) -> Masks:
    """Masks without that share of each kind, the units of a kind ranked together."""
    masks = full_masks(bench.groups)
    for kind, share in shares.items():
        found = ranked_together(bench.groups, scores, kind, share)
        masks |= {g.name: found[g.name] for g in bench.groups if g.kind == kind}
    return masks


def by_variance(bench: Bench, share: float) -> nn.Module:
    """The compact model without the hidden units of least variance, their means in the next layer's bias."""
    places = places_of(bench.model, bench.groups, bench.seen)
    sites = {g.name: bench.seen[places[g.name][0]] for g in bench.groups if g.kind == "mlp"}
    masks = ranked_together(bench.groups, {n: s.covariance.diagonal() for n, s in sites.items()}, "mlp", share)
    model = copy.deepcopy(bench.model)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, site in sites.items():
            mean = (site.x / site.rows).float() * ~masks[name]
            params[f"{name}.fc2.bias"] += params[f"{name}.fc2.weight"] @ mean
    apply_(model, bench.groups, masks)
    return compact(model, bench.groups, masks)


def merged(bench: Bench, tokens: int) -> nn.Module:
    """The dense model, as many tokens merging in every block; fewer where half of those that may are fewer."""
    model = copy.deepcopy(bench.plain)
    adapter = adapters.of(model)
    there, prefix = adapter.tokens(model), adapter.prefix(model)
    merges = FAMILIES["uniform"](there, prefix, len(adapter.blocks(model)), 2 * tokens / (there - prefix))
    return adapters.merge_(model, merges)


def narrowed_and_merged(bench: Bench, scores: Mapping[str, Tensor], tokens: int) -> nn.Module:
    """Widths pruned and refitted, then tokens merged down to what the dense model costs with `tokens` of every block.

    Raises:
        ValueError: no schedule reaches that.
    """
    target = WIDTHS_FIRST * bench.table.dense_ms
    masks, _ = drop_to_target(scores, full_masks(bench.groups), bench.groups, bench.table, target)
    small = bench.pruned(masks, refit=True)
    work = work_of(small)
    allowed = work_of(bench.plain)(adapters.merges(merged(bench, tokens)))
    found = schedules(small, lambda merges: work(merges) <= allowed).get("uniform")
    if found is None:
        raise ValueError(f"no uniform schedule brings the narrower model to {allowed} multiply-accumulates")
    return adapters.merge_(small, found)


class Neighbours:
    """Rows of one bench.

    Args:
        bank, asked: labelled images of the k-NN, batches.
    """

    def __init__(self, bench: Bench, rows: Resumed, bank, asked) -> None:
        self.bench, self.rows, self.bank, self.asked = bench, rows, bank, asked
        self.dense = size(bench.plain)
        self._scores: dict[str, Tensor] | None = None

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """By the loss that remains after a refit; asked once."""
        if self._scores is None:
            self._scores = self.bench.remaining()
        return self._scores

    def measure(self, setting: str) -> None:
        """Rows of a setting that the file has not yet, and what is published of it."""
        shares, bench = SETTINGS[setting], self.bench
        makes: dict[str, Callable[[], nn.Module]] = {}
        if "tokens" in shares:
            makes["nvit"] = lambda: merged(bench, shares["tokens"])
            if shares["tokens"] == max(s.get("tokens", 0) for s in SETTINGS.values()):
                makes["nvit, widths too"] = lambda: narrowed_and_merged(bench, self.scores, shares["tokens"])
        else:
            makes["nvit"] = lambda: bench.pruned(chosen(bench, self.scores, shares), refit=True)
        if set(shares) == {"mlp"}:
            makes["VBP's rule, here"] = lambda: by_variance(bench, shares["mlp"])
        for method, make in makes.items():
            if self.rows.find(setting=setting, method=method) is None:
                self.add(setting, method, make().eval(), near="heads" in shares)
        for q in QUOTES:
            if q.setting == setting:
                same = {"model": q.model, "top1": q.top1, "dense": q.dense, "retention": q.retention}
                self.rows.add(setting=setting, method=q.method, **same, published=True, source=q.source)

    def add(self, setting: str, method: str, model: nn.Module, *, near: bool) -> None:
        """A row of a model; `near`: with its k-NN."""
        right, dense = answers(model, self.bench.evaluation), self.bench.dense
        kept, low, high = ratio_bootstrap(right.tolist(), dense.tolist())
        row = {"setting": setting, "method": method, "model": "DeiT-Ti", "top1": 100 * float(right.mean())}
        row |= {"dense": 100 * float(dense.mean()), "retention": kept, "low": low, "high": high}
        row |= {"published": False, "source": ""}
        row |= {key: value / self.dense[key] for key, value in size(model).items()}
        if near:
            found, before = (self.nearest(m) for m in (model, self.bench.plain))
            share = ratio_bootstrap(found.tolist(), before.tolist())
            row |= {"knn": percent(found)[0], "knn_dense": percent(before)[0]}
            row |= dict(zip(("knn_retention", "knn_low", "knn_high"), share, strict=True))
        images = sum(len(x) for x, _ in self.bench.calibration)
        self.rows.add(**row, images=len(right), calibration=images, right=bits(right))

    def nearest(self, model: nn.Module) -> Tensor:
        """Right or wrong by image, of the k-NN of a classifier's features."""
        tower = without_head(model)
        banks: list[Bank] = [features_of(tower, loader) for loader in (self.bank, self.asked)]
        return knn(*banks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="of those that the table has; all")
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    args = parser.parse_args()
    if unknown := set(args.settings).difference(SETTINGS):
        parser.error(f"no settings {sorted(unknown)}; there are {', '.join(SETTINGS)}")
    torch.set_num_threads(1)
    root = data_folder()
    bench = Bench(root, args.images, 0)
    bank = images_of(root / "imagenet_sample1000", bench.plain, root / "imagenet_synsets.txt")
    rows = Resumed("neighbours", ("setting", "method"))
    table = Neighbours(bench, rows, DataLoader(bank, BATCH), bench.evaluation)
    for setting in args.settings or SETTINGS:
        table.measure(setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
