"""One optimisation step of a masked or compact model, and its state on disk; shared by pruning and finetuning."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .. import adapters, parallel
from ..config import TrainingConfig
from ..structure.run_state import load_run_state, save_run_state
from ..utils.devices import sent
from .data import seed_draws
from .distill import Objective
from .optimizer import decay_groups, fused_adamw
from .recipe import recipe_of, refuse_other
from .step import AMP, GraphedStep, Step

LOOK = 1.0
"""Seconds on a GPU between two looks at the loss."""


class Trainer:
    """Optimiser, mixed precision, ranks, moving average and run state around `Objective`.

    Every draw of a step follows from the seed and the step's number, so a state on disk holds no random state. With
    several ranks each takes its share of the batch; gradients are those of the whole batch, the same on every rank.

    One process with AdamW takes `step.Step`, which reads nothing back, on CUDA as a graph. Several ranks, fp16 and
    other optimisers go by Accelerate, where the host looks at every step.

    Args:
        observe: gets gradients by parameter name after every backward pass, before they are clipped and weights move.
        constrain: called after every update, to put back what must stay as it is.
        replayed: called when a captured step was replayed, for what `observe` counts.

    Attributes:
        model: the module that is trained, in place; with `fsdp` hollow until `averaged` fills it again.
        call: the student's logits as a module; `call.model` is `model`, or with `fsdp` its twin in shards.
        step: steps taken.
        note: why steps are not captured on this GPU, if so.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainingConfig,
        lr: float,
        state_file: Path | None,
        *,
        observe: Callable[[Mapping[str, Tensor]], None] | None = None,
        constrain: Callable[[], None] | None = None,
        replayed: Callable[[], None] | None = None,
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=False)
        device = next(model.parameters()).device
        alike = DistributedDataParallelKwargs(broadcast_buffers=False)  # masks are the same everywhere already
        self.accelerator = Accelerator(mixed_precision=config.amp, cpu=device.type == "cpu", kwargs_handlers=[alike])
        if self.accelerator.num_processes != parallel.world():
            raise ValueError(f"Accelerate sees 1 process of {parallel.world()}; start them with torchrun")
        self.objective, self.config, self.state_file = objective, config, state_file
        self.observe, self.constrain = observe, constrain
        self.base_lr = lr * config.batch_size / 512
        self.model, logits = model, adapters.find(model).logits
        self.ema = ModelEmaV3(model, decay=config.ema) if config.ema else None
        self.sharded = config.fsdp and parallel.world() > 1
        self.call = parallel.shard(model, logits) if self.sharded else parallel.Call(model, logits)
        if self.sharded and self.ema is not None:
            self.ema.module = parallel.shard(self.ema.module, logits).model
        groups = decay_groups(self.call.model, config.weight_decay)
        optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=self.base_lr, weight_decay=0.0)
        self._stepper: Step | GraphedStep | None = None
        self.note = ""
        if parallel.world() == 1 and config.amp in AMP and fused_adamw(optimizer):
            self.optimizer = optimizer
            how = {"amp": config.amp, "clip": config.grad_clip, "observe": observe, "constrain": constrain}
            self._stepper = Step(self.call, objective, optimizer, **how)
            if device.type == "cuda" and config.graphs:
                self._stepper = GraphedStep(self._stepper, replayed)
        else:
            self._by_accelerate(optimizer)
            if device.type == "cuda":
                why = f"optimizer {config.optimizer}" if config.amp in AMP else f"amp {config.amp}"
                self.note = f"training steps are not captured in a graph: {why if parallel.world() == 1 else 'ranks'}"
        self._ending = parallel.Ending()
        self.mixup = None
        if config.mixup or config.cutmix:
            smoothing, classes = config.label_smoothing, adapters.classes(model)
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)
        self.step, self._saved_at, self._due, self._whole = 0, time.monotonic(), False, True
        self._loss, self._looked_at = 0.0, 0.0

    def _by_accelerate(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps that the host watches. Accelerate shards on GPUs alone; ours are shards already."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another word for broadcast_buffers
            self.network = self.call if self.sharded else self.accelerator.prepare(self.call)
        self.optimizer = self.accelerator.prepare(optimizer)

    def train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """Forward, backward, optimiser step. Gradients stay on the parameters until the next call.

        Raises:
            ValueError: the labels are not the task's.
            FloatingPointError: where the host watches, the loss or a gradient is not finite; weights are left as they
                were. Elsewhere `look` raises it.
        """
        labels = self.objective.task.labels(images, labels)
        self._whole = True
        self._ending.check()
        training_(self.call.model, self.config.train_mode)
        seed_draws(self.config.seed, 2**31 + self.step)
        if isinstance(self._stepper, GraphedStep):
            images, labels = self._stepper.stage(images, labels)
            torch.cuda.current_stream(images.device).wait_stream(self._stepper.copying)
        else:
            images, labels = (sent(t, self.accelerator.device) for t in (images, labels))
        if self.mixup is not None:
            if len(images) % 2:
                images, labels = images[:-1], labels[:-1]
            images, labels = self.mixup(images, labels)
        if self._stepper is None:
            self._watched_step(images, labels)
        else:
            late = time.monotonic() - self._saved_at >= self.config.save_every
            self._due = self.state_file is not None and late
            self._whole = False
            self._stepper(images, labels)
        self.step += 1
        self._whole = self._stepper is not None

    def _watched_step(self, images: Tensor, labels: Tensor) -> None:
        if parallel.world() > 1:  # mixup is one draw for all ranks, dropout and drop path are each rank's own
            seed_draws(self.config.seed, 2**31 + self.step, 1 + parallel.rank())
        self.optimizer.zero_grad()
        with self.accelerator.autocast():
            loss = self.objective.of_logits(self.network(images), images, labels)
        self._loss, weight = self._across(loss.detach(), len(images))
        if not math.isfinite(self._loss):
            raise FloatingPointError(
                f"the loss is {self._loss} at step {self.step}; lower the learning rate or check the data"
            )
        self.accelerator.backward(loss * weight)
        self.accelerator.unscale_gradients()
        finite = parallel.finite(list(self.grads().values()))
        if not finite and self.config.amp != "fp16":
            raise FloatingPointError(f"a gradient is not finite at step {self.step}; the last good state is kept")
        if finite and self.observe is not None:
            self.observe(self.grads())
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.call.model.parameters(), self.config.grad_clip)
        self._whole = False
        self.optimizer.step()
        if self.constrain is not None:
            self.constrain()

    def look(self) -> float:
        """The last step's loss.

        Raises:
            FloatingPointError: a step was not finite; weights are those of the step before it.
        """
        if self._stepper is not None:
            self._looked_at = time.monotonic()
            self._loss = getattr(self._stepper, "step", self._stepper).look()
        return self._loss

    @property
    def look_due(self) -> bool:
        """Whether it is time to look: at once where that costs nothing, on a GPU every second."""
        on_gpu = self._stepper is not None and self.accelerator.device.type == "cuda"
        return not on_gpu or time.monotonic() - self._looked_at >= LOOK

    def masks_changed(self) -> None:
        """Shapes are others now: a captured step is captured again."""
        if isinstance(self._stepper, GraphedStep):
            self._stepper.reset()

    def _across(self, loss: Tensor, images: int) -> tuple[float, float]:
        """The whole batch's loss, and the factor of this rank's that makes a mean over ranks a mean over images.

        Rank 0's word on whether the run state is due goes with it.
        """
        late = time.monotonic() - self._saved_at >= self.config.save_every
        due = self.state_file is not None and parallel.main() and late
        total, count, due = parallel.sums((float(loss) * images, images, due), loss.device)
        self._due = bool(due)
        return total / count, images * parallel.world() / count

    @property
    def skipped(self) -> bool:
        """Whether fp16 scaling made the optimiser skip the last step (its gradients are not finite)."""
        return self._stepper is None and self.accelerator.optimizer_step_was_skipped

    def after_step(self) -> None:
        """Update the moving average, once pruned weights are zero again."""
        if self.ema is not None:
            self.ema.update(self.call.model)

    def weights(self) -> Mapping[str, Tensor]:
        """Full parameters by name of what is to be kept: of the moving average if there is one."""
        module = self.call.model if self.ema is None else self.ema.module
        return parallel.gathered(dict(module.named_parameters()))

    def averaged(self) -> nn.Module:
        """The model to keep: the moving average if there is one. Ends the training of shards."""
        if self.sharded:
            parallel.fill_(self.model, self.weights())
            return self.model
        return self.model if self.ema is None else self.ema.module

    def grads(self) -> dict[str, Tensor]:
        """Gradients of the last step by parameter name, as the parameters lie."""
        return {name: p.grad for name, p in self.call.model.named_parameters() if p.grad is not None}

    def due(self) -> bool:
        """Whether it is time to write the run state again, as of the last step; the same on every rank."""
        return self._due

    @contextmanager
    def surviving(self, state: Callable[[], tuple[Mapping[str, Any], Mapping[str, Tensor]]]) -> Iterator[None]:
        """Training inside ends with KeyboardInterrupt after the step in which a person asks for it, and with RankLost
        when another rank is lost.

        Where rank 0 survives and has the whole model, it writes the run state of the last complete step first.
        """
        with self._ending:
            try:
                with parallel.watch():
                    yield
                self._whole = True
                self._ending.check()
            except (parallel.RankLost, KeyboardInterrupt, RuntimeError) as e:
                # A loader's processes may get the signal as well, and fail before anyone looks at it here.
                cause = self._ending.asked if isinstance(e, RuntimeError) else e
                if cause is None:
                    raise
                saving = cause is self._ending.asked or isinstance(cause, parallel.RankLost)
                if saving and self._whole and self.state_file is not None and parallel.main() and not self.sharded:
                    self.look()
                    save_run_state(self.state_file, *self._state(*state()))
                raise cause from None

    def save(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the run state: model, optimiser, average, step, and what the caller adds.

        Shards are gathered and rank 0 writes, so that any number of ranks can go on from it, in shards or not.
        """
        if self.state_file is None:
            return
        self.look()
        state = self._state(values, tensors)
        parallel.from_main(lambda: save_run_state(self.state_file, *state))
        self._saved_at = time.monotonic()

    def _state(
        self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        every = {f"model.{n}": p for n, p in self.call.model.named_parameters()}
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
        own["recipe"] = recipe_of(self.config)
        return parallel.to_main(every | dict(tensors)), dict(values) | {"trainer": own}

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Restore what `save` wrote; returns the caller's own part.

        Raises:
            ValueError: the state is damaged, of another model, or of a run with another recipe.
        """
        tensors, values = load_run_state(self.state_file)
        if "trainer" not in values:
            raise ValueError(f"{self.state_file} is of a run without training; resume with the same recipe")
        own = values.pop("trainer")
        refuse_other(self.state_file, own["recipe"], self.config)
        slots: dict[int, dict[str, Any]] = {}
        params = dict(self.call.model.named_parameters())
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
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, held in slots.items():
            for slot, value in held.items():
                if isinstance(value, Tensor):
                    held[slot] = parallel.like(value, trained[index])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if own["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(own["scaler"])
        self.step = own["step"]
        if self._stepper is not None:
            getattr(self._stepper, "step", self._stepper).taken.fill_(self.step)
        return rest, values


def _copy(params: Mapping[str, Tensor], name: str, tensor: Tensor, source: Path | None) -> None:
    if name not in params or params[name].shape != tensor.shape:
        raise ValueError(f"{source} is of another model: {name} {tuple(tensor.shape)} does not fit; drop --resume")
    params[name].copy_(parallel.like(tensor, params[name]))


def training_(model: nn.Module, dropout: bool) -> None:
    """Put a model in the mode of a training step: dropout and drop path as asked for; batch norms gather statistics in
    any case, without which a new head's would never have any."""
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
