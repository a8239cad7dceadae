"""One optimisation step of a masked or compact model, and its state on disk; shared by pruning and finetuning."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import adapters
from .config import FinetuneConfig, PruneConfig, TrainingConfig
from .data import seed_draws
from .distill import Objective
from .snapshot import load_run_state, save_run_state


class Trainer:
    """Optimiser, mixed precision, moving average and run state around `Objective`.

    Every draw of a step follows from the seed and the step's number, so a state on disk holds no random state.

    Attributes:
        model: the module that is trained, in place.
        step: steps taken.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: TrainingConfig, lr: float, state_file: Path | None
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=False)
        device = next(model.parameters()).device
        self.accelerator = Accelerator(mixed_precision=config.amp, cpu=device.type == "cpu")
        self.objective, self.config, self.state_file = objective, config, state_file
        self.base_lr = lr * config.batch_size / 512
        optimizer = create_optimizer_v2(model, opt=config.optimizer, lr=self.base_lr, weight_decay=config.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.mixup = None
        if config.mixup or config.cutmix:
            smoothing, classes = config.label_smoothing, adapters.classes(model)
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)
        self.step, self._saved_at = 0, time.monotonic()

    def train_step(self, images: Tensor, labels: Tensor) -> float:
        """Forward, backward, optimiser step. Gradients stay on the parameters until the next call.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; weights are left as they were.
        """
        self.model.train(self.config.train_mode)
        seed_draws(self.config.seed, 2**31 + self.step)
        device = self.accelerator.device
        images, labels = images.to(device), labels.to(device)
        if self.mixup is not None:
            if len(images) % 2:
                images, labels = images[:-1], labels[:-1]
            images, labels = self.mixup(images, labels)
        self.optimizer.zero_grad()
        with self.accelerator.autocast():
            loss = self.objective(self.model, images, labels)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}; lower the learning rate or check the data"
            )
        self.accelerator.backward(loss)
        if self.config.grad_clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        if self.config.amp != "fp16":
            self._check_gradients()
        self.optimizer.step()
        self.step += 1
        return value

    def _check_gradients(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(grads)):
            raise FloatingPointError(f"a gradient is not finite at step {self.step}; the last good state is kept")

    @property
    def skipped(self) -> bool:
        """Whether fp16 scaling made the optimiser skip the last step (its gradients are not finite)."""
        return self.accelerator.optimizer_step_was_skipped

    def after_step(self) -> None:
        """Update the moving average, once pruned weights are zero again."""
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model))

    def averaged(self) -> nn.Module:
        """The model to keep: the moving average if there is one."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def grads(self) -> dict[str, Tensor]:
        """Gradients of the last step by parameter name."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def due(self) -> bool:
        """Whether it is time to write the run state again."""
        return self.state_file is not None and time.monotonic() - self._saved_at >= self.config.save_every

    def save(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the run state: model, optimiser, average, step, and what the caller adds."""
        if self.state_file is None:
            return
        every = {f"model.{n}": p for n, p in self.accelerator.unwrap_model(self.model).named_parameters()}
        if self.ema is not None:
            every |= {f"ema.{n}": p for n, p in self.ema.module.named_parameters()}
        plain = {}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                if isinstance(value, Tensor):
                    every[f"optimizer.{index}.{key}"] = value
                else:
                    plain[f"{index}.{key}"] = value
        scaler = getattr(self.accelerator, "scaler", None)
        own = {"step": self.step, "optimizer": plain, "scaler": None if scaler is None else scaler.state_dict()}
        own["recipe"] = self._recipe()
        save_run_state(self.state_file, every | dict(tensors), dict(values) | {"trainer": own})
        self._saved_at = time.monotonic()

    def _recipe(self) -> dict[str, Any]:
        """What decides the course of a run, as JSON gives it back."""
        names = {f.name for base in (PruneConfig, FinetuneConfig) for f in fields(base)} - {"save_every"}
        return json.loads(json.dumps({k: v for k, v in asdict(self.config).items() if k in names}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Restore what `save` wrote; returns the caller's own part.

        Raises:
            ValueError: the state is damaged, of another model, or of a run with another recipe.
        """
        tensors, values = load_run_state(self.state_file)
        own = values.pop("trainer")
        theirs, mine = own["recipe"], self._recipe()
        if differing := sorted(k for k in theirs.keys() | mine.keys() if theirs.get(k) != mine.get(k)):
            k = differing[0]
            raise ValueError(
                f"{self.state_file} is of a run with {k} {theirs.get(k)}, this one has {mine.get(k)}. "
                "Resume with the same recipe, or start anew without --resume."
            )
        slots: dict[int, dict[str, Any]] = {}
        params = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        averages = {} if self.ema is None else dict(self.ema.module.named_parameters())
        rest = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                part, _, key = name.partition(".")
                if part == "model":
                    _copy(params, key, tensor, self.state_file)
                elif part == "ema":
                    _copy(averages, key, tensor, self.state_file)
                elif part == "optimizer":
                    index, _, slot = key.partition(".")
                    slots.setdefault(int(index), {})[slot] = tensor
                else:
                    rest[name] = tensor
        for key, value in own["optimizer"].items():
            index, _, slot = key.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if own["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(own["scaler"])
        self.step = own["step"]
        return rest, values


def _copy(params: Mapping[str, Tensor], name: str, tensor: Tensor, source: Path | None) -> None:
    if name not in params or params[name].shape != tensor.shape:
        raise ValueError(f"{source} is of another model: {name} {tuple(tensor.shape)} does not fit; drop --resume")
    params[name].copy_(tensor)
