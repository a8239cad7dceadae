"""A pruner that follows somebody else's training loop: what the callbacks of all loops share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..prune.folder import RunFolder
from ..prune.pruner import Pruner
from ..prune.result import Pruned


class Following:
    """Prunes a model while a loop of others trains it; a compact model is kept as soon as a target is met.

    Attributes:
        pruner: of the model in training; None before it begins.
        snapshots: a compact model for each target met, largest first; the loop trains the masked model on.
        stop: end training once every target is met.
    """

    def __init__(
        self,
        table: LatencyTable,
        config: PruneConfig | None = None,
        *,
        out: str | Path | None = None,
        stop: bool = True,
    ) -> None:
        self.table, self.config, self.stop = table, config or PruneConfig(), stop
        self.config.check()
        if not self.config.train:
            raise ValueError("this callback prunes while training, and the config says train=False; use nvit.prune")
        self.out = out
        self.pruner: Pruner | None = None
        self.snapshots: list[Pruned] = []
        self._known: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None

    def begin(self, model: nn.Module, accumulated: int = 1) -> None:
        """Mask `model`, on the device where it is trained; go on from `restore`d state, if there is any.

        Args:
            accumulated: backward passes to an optimizer step.

        Raises:
            ValueError: an unsupported model, another one than the table's, several processes, or a criterion that
                cannot read accumulated gradients.
        """
        if parallel.world() > 1:
            raise ValueError(
                f"this callback prunes in one process and there are {parallel.world()}; take one device, or "
                "`torchrun -m nvit prune`"
            )
        self.pruner = Pruner(model, self.table, self.config)
        if accumulated > 1 and getattr(self.pruner.criterion, "recorder", None) is not None:
            self.end()
            raise ValueError(
                f"criterion {self.config.saliency} reads every sample of a step, and {accumulated} backward passes are "
                "accumulated to one; accumulate none, or take criterion hessian"
            )
        folder = RunFolder(self.out, resume=self._known is not None)
        self.snapshots = []
        if self._known is not None:
            self.pruner.restore(*self._known)
            if self.pruner.met and self.out is None:
                raise ValueError(
                    f"the run met {self.pruner.met} before it was interrupted, and kept no files of it; give the "
                    "callback `out`, a folder for snapshots"
                )
            self.snapshots = folder.again(self.pruner, next(model.parameters()).device)
        self._folder, self._known = folder, None

    def observe(self) -> bool:
        """Add the gradients that lie on the model to the saliency; False, and nothing added, where one is not finite
        (a step that a gradient scaler leaves out)."""
        grads = [p.grad for p in self.pruner.params.values() if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in grads)
        if finite and not self.pruner.done:
            self.pruner.observe()
        return finite

    def stepped(self) -> bool:
        """After the optimizer's step: zero what is pruned, decide when due; whether training should end now."""
        self.pruner.project()
        for target in self.pruner.advance():
            self.snapshots.append(self._folder.take(self.pruner, target, self.pruner.compact()))
        return self.pruner.done and self.stop

    def end(self) -> None:
        """Take captures off the model, which stays masked."""
        if self.pruner is not None:
            self.pruner.stop_recording()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors for `restore`."""
        return self.pruner.state()

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Have `begin` go on from what `state` gave."""
        self._known = values, tensors
