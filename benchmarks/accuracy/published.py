"""What others publish of models pruned without training, quoted: none of these numbers was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quote:
    """Top-1 of ImageNet's 50,000 validation images, in percent.

    Attributes:
        setting: what left, in the words of `neighbours.SETTINGS`.
        dense, top1: before and after.
        source: where the numbers stand, as it was read.
    """

    method: str
    setting: str
    model: str
    dense: float
    top1: float
    source: str

    @property
    def retention(self) -> float:
        return self.top1 / self.dense


CORP = "arXiv:2602.05243, table of DeiT at 50 % in the authors' repository BOX-LEO/CORP"
VBP = "arXiv:2507.12988, Table 10 (DeiT-T), as a public benchmark of Torch-Pruning's VBP copies it"
TOME_CIS = "table of DeiT-Ti in the authors' repository kukwang/Token-Merging-with-Class-Importance-Score (IECON 2023)"
TOME = "arXiv:2210.09461, DeiT-T as Papers with Code lists it; dense: arXiv:2012.12877"

QUOTES = (
    Quote("CORP", "half of MLP", "DeiT-Ti", 72.02, 55.37, CORP),
    Quote("CORP", "half of QK", "DeiT-Ti", 72.02, 64.25, CORP),
    Quote("CORP", "half of MLP and QK", "DeiT-Ti", 72.02, 41.36, CORP),
    Quote("VBP", "20 % of MLP", "DeiT-Ti", 72.02, 68.87, VBP),
    Quote("VBP", "half of MLP", "DeiT-Ti", 72.02, 39.58, VBP),
    Quote("ToMe with class importance", "8 tokens a block", "DeiT-Ti", 72.132, 71.614, TOME_CIS),
    Quote("ToMe with class importance", "12 tokens a block", "DeiT-Ti", 72.132, 70.934, TOME_CIS),
    Quote("ToMe with class importance", "16 tokens a block", "DeiT-Ti", 72.132, 69.012, TOME_CIS),
    Quote("ToMe, trained with it", "8 tokens a block", "DeiT-Ti", 72.2, 71.7, TOME),
    Quote("ToMe, trained with it", "12 tokens a block", "DeiT-Ti", 72.2, 71.4, TOME),
    Quote("ToMe, trained with it", "16 tokens a block", "DeiT-Ti", 72.2, 70.7, TOME),
)
"""SnapViT (arXiv:2510.17700) is not among them: it names the setting of 35 % of MLP and 20 % of heads, and publishes
larger models alone, by k-NN. Nor is ToMe on DeiT-Ti without training, which was not found."""
