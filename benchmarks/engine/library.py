"""What the engine's benchmarks share: the model they run on, widths like NViT's, masks at half of every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from nvit.spec import KINDS, Group
from nvit.structure.masks import Masks, full_masks

WIDTHS = {
    "B": (496, 8, 40, 56, 1920),
    "H": (480, 8, 40, 56, 1744),
    "S": (400, 6, 40, 56, 1456),
    "T": (208, 4, 32, 48, 864),
}
"""`emb`, `heads`, `qk_dim`, `v_dim`, `mlp` of every block."""
TINY = {"half": (96, 2, 32, 32, 384)}


@dataclass(frozen=True)
class Setting:
    """What is measured on: DeiT-B in bf16 on a GPU; two small blocks in fp32, to run every line on a CPU.

    Attributes:
        amp: autocast's dtype, None for none.
    """

    device: torch.device
    model: str
    options: dict
    batch_size: int
    amp: torch.dtype | None

    @classmethod
    def of(cls, tiny: bool, batch_size: int, model: str = "deit_base_patch16_224") -> Setting:
        if tiny:
            small = {"img_size": 32, "depth": 2, "num_classes": 10}
            return cls(torch.device("cpu"), model.replace("base", "tiny"), small, 2, None)
        return cls(torch.device("cuda"), model, {}, batch_size, torch.bfloat16)

    def create(self) -> nn.Module:
        """The timm model, initialised from seed 0: speed does not depend on what was learned."""
        torch.manual_seed(0)
        return timm.create_model(self.model, **self.options).to(self.device).eval()

    def batch(self, model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random images and labels for `model`."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch_size, 3, *model.patch_embed.img_size, generator=generator)
        labels = torch.randint(model.num_classes, (self.batch_size,), generator=generator)
        return images.to(self.device), labels.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)


def half_masks(groups: Sequence[Group], generator: torch.Generator) -> dict[str, Tensor]:
    """Half the units of each group at random, in whole bundles; of odd numbers of bundles one more or less in turn."""
    masks = {}
    for g in groups:
        odd = g.blocks[0] % 2
        kept = max(g.multiple, (g.size // g.multiple + odd) // 2 * g.multiple)
        masks[g.name] = torch.zeros(g.size, dtype=torch.bool)
        masks[g.name][torch.randperm(g.size, generator=generator)[:kept]] = True
    return masks


def uniform(groups, kept: tuple[int, ...]) -> Masks:
    """Masks that keep the first so many units of each kind in every group."""
    by_kind = dict(zip(KINDS, kept, strict=True))
    masks = full_masks(groups)
    return {g.name: torch.arange(g.size, device=masks[g.name].device) < by_kind[g.kind] for g in groups}


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a CSV's cell."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
