"""The ablations of the paper's appendix B as data: what each differs in from ours, and the table of their answers.

`ours` is the paper's method with the saliency of DESIGN: iterative, distilled from the unpruned model, heads aligned,
saliencies of all structures ranked together less the credit for latency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.accuracy.paired import Difference, answered, paired_bootstrap

OURS = "ours"
PADDED = ", until the padded model is as fast"
"""End of the name of the second row of a run without alignment."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to prune.

    Attributes:
        table: the ablation that it belongs to.
        settings: fields of `nvit.PruneConfig` that differ from ours.
        pace: intervals between decisions, and bundles at each, as multiples of ours.
        align: whether heads stay equal, see `ragged`.
        per_structure: the same share of every kind of width leaves, in place of one ranking of all.
        hard: hard labels of another network count half, as the CNN teacher's.
        once: one decision on frozen weights; all steps of training come after it.
    """

    name: str
    table: str
    settings: Mapping[str, object] = field(default_factory=dict)
    pace: tuple[float, float] = (1, 1)
    align: bool = True
    per_structure: bool = False
    hard: bool = False
    once: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows that it gives."""
        return (self.name,) if self.align else (self.name, self.name + PADDED)


ARMS = (
    Arm(name=OURS, table=""),
    Arm(name="concatenated dims", table="alignment", align=False),
    Arm(name="cross entropy", table="objective", settings={"distill_weight": 0.0}),
    Arm(name="magnitude, all together", table="saliency", settings={"criterion": "magnitude"}),
    Arm(name="no latency term", table="latency", settings={"latency_weight": 0.0}),
    Arm(name="one shot, hessian", table="one shot", settings={"criterion": "hessian"}, once=True),
    Arm(name="hessian, per structure", table="saliency", per_structure=True),
    Arm(name="published criterion", table="criterion", settings={"criterion": "nvit"}),
    Arm(name="100 eta", table="latency", settings={"latency_weight": 4.85e-2}),
    Arm(name="one shot, remaining, refit", table="one shot", once=True,
        settings={"criterion": "remaining", "refit": True}),
    Arm(name="magnitude, per structure", table="saliency", settings={"criterion": "magnitude"}, per_structure=True),
    Arm(name="+ hard labels", table="objective", settings={"distill_weight": 0.0}, hard=True),
    Arm(name="+ unpruned teacher + hard labels", table="objective", hard=True),
    Arm(name="4 times rarer, 4 times the bundles", table="pace", pace=(4, 4)),
    Arm(name="twice the bundles", table="pace", pace=(1, 2)),
    Arm(name="one shot, curvature", table="one shot", settings={"criterion": "curvature"}, once=True),
    Arm(name="10 eta", table="latency", settings={"latency_weight": 4.85e-3}),
    Arm(name="1000 eta", table="latency", settings={"latency_weight": 4.85e-1}),
    Arm(name="twice as often, half the bundles", table="pace", pace=(0.5, 0.5)),
    Arm(name="two thirds of the bundles", table="pace", pace=(1, 2 / 3)),
    Arm(name="one shot, published criterion", table="criterion", settings={"criterion": "nvit"}, once=True),
)  # fmt: skip
"""In the order in which they are run, so that a run that ends early has something of every table."""


def difference(rows: Sequence[Mapping[str, str]], arm: str, other: str = OURS) -> Difference | None:
    """How far one arm is above another, share of images: by image the mean over the seeds that both have, then a paired
    bootstrap over images. None where they share no seed.

    Args:
        rows: of the CSV.
    """
    by = {(r["arm"], str(r["seed"])): answered(r["right"], int(r["images"])) for r in rows}
    seeds = [s for name, s in by if name == arm and (other, s) in by]
    if not seeds:
        return None
    mine, theirs = (np.mean([by[name, s] for s in seeds], axis=0) for name in (arm, other))
    return paired_bootstrap(mine, theirs)
