"""Pruning as a callback of the Trainer of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..config import PruneConfig
from ..latency.table import LatencyTable
from ..prune.result import Pruned
from ..structure.run_state import load_run_state, save_run_state
from .following import Following

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "nvit.integrations.hf needs transformers, which is not here; run `pip install nvit[hf]`"
    ) from None

STATE = "nvit_pruner.safetensors"
"""The pruner's state in a checkpoint folder of the Trainer, and the weights once more: transformers 5 writes a ViT's
under names that its Trainer does not find again, which it says in a warning."""

WEIGHT = "weight."
"""Before a weight's name in it."""


class PrunerCallback(TrainerCallback):
    """Prune the model of a transformers Trainer while it trains, and end when every target is met.

    The Trainer clips gradients before anyone sees them, to norm 1 unless `max_grad_norm=0`, so that saliency reads
    clipped ones. Its checkpoints hold the pruner's state: `trainer.train(resume_from_checkpoint=True)` goes on pruning.

    Args:
        table: of the model's latency, made before it is trained.
        config: `interval`, `latency_target` and the criterion; how weights are trained is the Trainer's.
        out: a folder for the snapshot at each target.
        stop: end training once every target is met; else the masked model is trained on.

    Attributes:
        snapshots: a compact model at each target met so far; `snapshots[-1].save(folder)` writes it.

    Raises:
        ValueError: from `train`: a model that cannot be pruned, several processes, or a checkpoint without our state.
    """

    def __init__(
        self,
        table: LatencyTable,
        config: PruneConfig | None = None,
        *,
        out: str | Path | None = None,
        stop: bool = True,
    ) -> None:
        self.following = Following(table, config, out=out, stop=stop)

    @property
    def snapshots(self) -> list[Pruned]:
        """Compact models of the targets met, largest first."""
        return self.following.snapshots

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **have: Any
    ) -> None:
        """Mask the model, on its device."""
        if state.global_step:
            path = _state_file(args, state)
            if not path.is_file():
                raise ValueError(
                    f"training goes on at step {state.global_step}, and {path} is not there; go on from a checkpoint "
                    "that was made with PrunerCallback, or start anew"
                )
            tensors, values = load_run_state(path)
            weights = {n.removeprefix(WEIGHT): t for n, t in tensors.items() if n.startswith(WEIGHT)}
            have["model"].load_state_dict(weights)
            self.following.restore(values, tensors)
        if args.max_grad_norm and not state.global_step:
            warnings.warn(
                f"the Trainer clips gradients to {args.max_grad_norm:g} before saliency reads them; TrainingArguments("
                "max_grad_norm=0) leaves them whole",
                stacklevel=2,
            )
        self.following.begin(have["model"], args.gradient_accumulation_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **have: Any
    ) -> None:
        """Read the gradients, put zeros where pruned, and decide when it is due."""
        if getattr(have.get("optimizer"), "step_was_skipped", False):
            return
        if not self.following.observe():
            raise FloatingPointError(
                f"a gradient is not finite at step {state.global_step}; lower the learning rate or check the data"
            )
        if self.following.stepped():
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **have: Any) -> None:
        """Write the pruner's state into the Trainer's checkpoint."""
        values, tensors = self.following.state()
        weights = {f"{WEIGHT}{n}": t for n, t in have["model"].state_dict().items()}
        save_run_state(_state_file(args, state), tensors | weights, values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **have: Any) -> None:
        """Leave the model masked and unobserved."""
        self.following.end()


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
