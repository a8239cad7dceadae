"""Training a compact model, or a new one, with the pruning objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from .. import adapters, parallel, tasks
from ..config import FinetuneConfig
from ..utils.logs import Log, Rate, unlogged
from ..utils.progress import Progress, showing, silent
from .batches import Loader
from .data import endless
from .distill import Objective
from .optimizer import set_rates
from .trainer import Trainer


class Cosine(CosineLRScheduler):
    """timm's, whose rates go into tensors where the optimiser holds tensors."""

    def update_groups(self, values: float | list[float]) -> None:
        groups = self.optimizer.param_groups
        set_rates(self.optimizer, values if isinstance(values, (list, tuple)) else [values] * len(groups))


@showing
def finetune(
    model: nn.Module,
    loader: Loader,
    config: FinetuneConfig,
    *,
    teacher: nn.Module | None = None,
    cnn_teacher: nn.Module | None = None,
    renormalise: tuple[Tensor, Tensor] | None = None,
    constrain: Callable[[], None] | None = None,
    state_file: Path | None = None,
    resume: bool = False,
    progress: Progress | bool = silent,
    log: Log = unlogged,
) -> nn.Module:
    """Train `model` in place for `config.epochs`, cosine schedule; returns it, or its moving average.

    Args:
        loader: batches `(images, labels)`, sized; `data.TrainingData` makes the run reproducible and resumable.
        teacher: the unpruned model for L_full.
        cnn_teacher: any timm model for the hard labels of L_CNN.
        constrain: called after every optimiser step, to put back what must stay as it is (the zeros of a 2:4 mask).
        state_file: where the run state is kept; with `resume` the run goes on from it if it is there.
        progress: a callback; True shows what the command shows.
        log: called with the loss, the rate and images per second as training goes, see `utils.logs`.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the last run state stays on disk.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> loader = nvit.data.TrainingData(nvit.data.Digits(training=True), batch_size=64)
    >>> config = nvit.FinetuneConfig(epochs=0.1, batch_size=64, distill_weight=0)
    >>> small = nvit.finetune(model, loader, config)
    >>> small.training
    False
    """
    parallel.join()
    adapters.find(model).prepare(model)
    parallel.same_weights_(model)
    task = tasks.settled(config, model)
    if teacher is not None:
        tasks.settled(config, teacher)
    objective = Objective.of(config, task, teacher, cnn_teacher, renormalise)
    trainer = Trainer(model, objective, config, config.lr, state_file, constrain=constrain)
    if trainer.note:
        progress(0, 0, trainer.note)
    if trainer.sharded and constrain is not None:
        raise ValueError("constrain works on whole weights; finetune under it without fsdp")
    total = max(1, round(config.epochs * len(loader)))
    warm = min(total - 1, round(config.warmup_epochs * len(loader)))
    schedule = Cosine(
        trainer.optimizer,
        t_initial=total - warm,  # after the warm-up, so that it ends at min_lr
        lr_min=config.min_lr,
        warmup_t=warm,
        warmup_lr_init=config.warmup_lr if warm else 0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    if parallel.from_main(lambda: resume and state_file is not None and state_file.exists()):
        trainer.load()
    rate = Rate()
    if trainer.step < total:
        with trainer.surviving(lambda: ({}, {})):
            for step, (images, labels) in endless(loader, config.seed, trainer.step):
                schedule.step_update(step)
                trainer.train_step(images, labels)
                trainer.after_step()
                rate.images += len(images) * parallel.world()
                if trainer.look_due or trainer.step >= total:
                    loss = trainer.look()
                    progress(trainer.step, total, f"finetune: loss {loss:.3f}")
                    lr = float(trainer.optimizer.param_groups[0]["lr"])
                    log("finetune", trainer.step, {"loss": loss, "lr": lr, "images_per_s": rate.read()})
                if trainer.step >= total:
                    break
                if trainer.due():
                    trainer.save({}, {})
    trainer.save({}, {})
    return trainer.averaged().eval()
