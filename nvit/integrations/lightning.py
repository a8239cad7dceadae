"""Pruning as a callback of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..prune.result import Pruned
from .following import Following

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "nvit.integrations.lightning needs Lightning, which is not here; run `pip install nvit[lightning]`"
    ) from None


class PrunerCallback(Callback):
    """Prune the model of a LightningModule while Lightning trains it, and end when every target is met.

    Saliency reads gradients before they are clipped. Checkpoints of Lightning hold the pruner's state, so that
    `trainer.fit(..., ckpt_path=...)` goes on pruning.

    Args:
        table: of the model's latency, made before it is trained.
        config: `interval`, `latency_target` and the criterion; how weights are trained is the module's own.
        model: where the LightningModule keeps the model, as `net` or `student.encoder`.
        out: a folder for the snapshot at each target.
        stop: end training once every target is met; else the masked model is trained on.

    Attributes:
        snapshots: a compact model at each target met so far; `snapshots[-1].save(folder)` writes it.

    Raises:
        ValueError: from `fit`: no such model, one that cannot be pruned, several processes, or several optimizers.
    """

    def __init__(
        self,
        table: LatencyTable,
        config: PruneConfig | None = None,
        *,
        model: str = "model",
        out: str | Path | None = None,
        stop: bool = True,
    ) -> None:
        self.following, self.where = Following(table, config, out=out, stop=stop), model
        self._steps, self._finite = 0, True

    @property
    def snapshots(self) -> list[Pruned]:
        """Compact models of the targets met, largest first."""
        return self.following.snapshots

    def _model(self, module: LightningModule) -> nn.Module:
        try:
            return module.get_submodule(self.where)
        except AttributeError:
            names = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"{type(module).__name__} has no model {self.where!r}; it has {names}. Name it as "
                "PrunerCallback(..., model=...)"
            ) from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the model, on its device."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers; pruning follows one"
            )
        self._steps = trainer.global_step
        self.following.begin(self._model(pl_module), trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Read the gradients, unscaled and not yet clipped."""
        self._finite = self.following.observe()
        if not self._finite and getattr(trainer.precision_plugin, "scaler", None) is None:
            raise FloatingPointError(
                f"a gradient is not finite at step {trainer.global_step}; lower the learning rate or check the data"
            )

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """After a step of the optimizer: zeros where pruned, and a decision when it is due."""
        if trainer.global_step == self._steps:  # gradients are being accumulated
            return
        self._steps = trainer.global_step
        if self._finite and self.following.stepped():
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model masked and unobserved."""
        self.following.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model masked and unobserved."""
        self.following.end()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        if self.following.pruner is None:
            return {}
        values, tensors = self.following.state()
        return {"values": values, "tensors": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What a checkpoint holds."""
        if state_dict:
            self.following.restore(state_dict["values"], state_dict["tensors"])
