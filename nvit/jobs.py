"""Each command as one library call: from its flags to models, data, tables and a result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from . import adapters, analysis, snapshot
from .config import (
    DIGITS,
    CompareCommand,
    DataFlags,
    EvaluateCommand,
    FinetuneCommand,
    LatencyCommand,
    LatencyFlags,
    ModelFlags,
    PruneCommand,
    TrainingConfig,
    WidthsCommand,
)
from .data import Digits, TrainingData, evaluation_loader, open_images, subset, transform
from .distill import frozen, renormalisation
from .evaluate import accuracy, macs, parameters, peak_memory
from .finetune import finetune
from .latency import LatencyTable, current_setting, default_cache, time_models
from .progress import Progress, silent
from .pruner import Pruned, prune
from .report import write_csv, write_result
from .spec import BUNDLE_SIZES, KINDS


def pick_device(name: str) -> torch.device:
    """The device of a flag; the GPU if there is one when empty."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this machine has no usable CUDA GPU; use --device cpu")
    return device


def open_model(name: str, flags: ModelFlags, *, scratch: bool = False) -> nn.Module:
    """A prepared model on its device: a snapshot folder, a timm name, or the bundled digits model.

    Raises:
        ValueError: unknown name, damaged snapshot or checkpoint, unsupported family.
    """
    device = pick_device(flags.device)
    if name == DIGITS:
        name = str(snapshot.BUNDLED)
    if snapshot.is_snapshot(name):
        model = snapshot.fresh(snapshot.load_spec(name)) if scratch else snapshot.load(name)
    elif Path(name).is_dir():
        raise ValueError(f"{name} is a folder but not a snapshot: spec.json is missing")
    elif not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model {name!r} is neither a snapshot folder nor a timm model{hint}")
    else:
        model = _timm_model(name, flags, scratch)
    adapters.find(model).prepare(model)
    return model.to(device)


def _timm_model(name: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    classes = {"num_classes": flags.num_classes} if flags.num_classes else {}
    pretrained = flags.pretrained and not flags.checkpoint and not scratch
    try:
        model = timm.create_model(name, pretrained=pretrained, **classes)
    except Exception as e:
        if not pretrained:
            raise
        raise ValueError(f"{name}: pretrained weights cannot be had ({e}); give --checkpoint or --no-pretrained") from e
    if flags.checkpoint and not scratch:
        if not Path(flags.checkpoint).is_file():
            raise ValueError(f"checkpoint {flags.checkpoint} does not exist")
        try:
            load_checkpoint(model, flags.checkpoint, use_ema=False, weights_only=True)
        except (RuntimeError, KeyError, OSError, SafetensorError, EOFError, ValueError) as e:
            first = str(e).strip().splitlines()[0]
            raise ValueError(f"checkpoint {flags.checkpoint} does not fit {name}: {first}") from None
    return model


def open_training_data(
    model: nn.Module, flags: DataFlags, config: TrainingConfig, augment: bool = True
) -> TrainingData:
    """The shuffled training batches of a command."""
    if _uses_digits(model, flags.data):
        dataset = Digits(training=True, augment=augment)
    else:
        if not flags.data:
            raise ValueError("--data is missing: a folder of class folders, or a timm data set as torch/cifar10:FOLDER")
        recipe = config if augment else None
        pipeline = transform(resolve_data_config(model=model), resize=flags.resize, training=recipe)
        classes = model.num_classes
        dataset = open_images(flags.data, "train", class_map=flags.class_map, classes=classes, transform=pipeline)
    return TrainingData(dataset, config.batch_size, config.seed, flags.workers, config.repeats if augment else 1)


def open_evaluation_data(model: nn.Module, flags: DataFlags, batch_size: int):
    """The evaluation batches of a command; None where no data is named."""
    where = flags.eval_data or flags.data
    if _uses_digits(model, where):
        dataset = Digits(training=False)
    elif not where:
        return None
    else:
        pipeline = transform(resolve_data_config(model=model), resize=flags.resize)
        classes = model.num_classes
        dataset = open_images(where, "validation", class_map=flags.class_map, classes=classes, transform=pipeline)
    return evaluation_loader(subset(dataset, flags.eval_images), batch_size, flags.workers)


def _uses_digits(model: nn.Module, data: str) -> bool:
    bundled = resolve_data_config(model=model)["input_size"] == (1, 8, 8)
    if data == DIGITS and not bundled:
        raise ValueError("the bundled digits are 1 × 8 × 8 and fit the bundled model alone; give --data for this one")
    return data == DIGITS or (bundled and not data)


def sample_images(model: nn.Module, batch_size: int) -> Tensor:
    """Random images of the model's input size, on its device and in its dtype."""
    p = next(model.parameters())
    size = resolve_data_config(model=model)["input_size"]
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)


def open_table(model: nn.Module, flags: LatencyFlags, bundle_sizes, progress: Progress = silent) -> LatencyTable:
    """The latency table of a command: from a file, analytic, or measured here and cached.

    Raises:
        ValueError: a table of another model or setting.
    """
    if flags.table == "analytic":
        return LatencyTable.analytic(model, bundle_sizes)
    if flags.table:
        table = LatencyTable.load(flags.table)
        if table.setting is not None:
            p = next(model.parameters())
            tokens = adapters.find(model).tokens(model)
            table.check(current_setting(p.device, p.dtype, flags.latency_batch, tokens), _widths(model))
        return table
    p = next(model.parameters())
    progress(0, 1, f"measuring latency, about {flags.latency_seconds:.0f} s")
    table = LatencyTable.measure(
        model,
        flags.latency_batch,
        p.device,
        p.dtype,
        bundle_sizes=bundle_sizes,
        seconds=flags.latency_seconds,
        cache=default_cache(),
    )
    progress(1, 1, "measuring latency")
    return table


def _widths(model: nn.Module):
    return snapshot.spec_of(model).blocks


def _size(model: nn.Module) -> dict[str, Any]:
    size = resolve_data_config(model=model)["input_size"]
    return {"params": parameters(model), "macs": macs(model, size)}


def run_prune(command: PruneCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit prune`: dense accuracy, pruning, finetuning, accuracy and latency of each snapshot."""
    start = time.monotonic()
    out = Path(command.out)
    if (out / "result.json").exists() and not command.resume:
        raise ValueError(f"{out} holds a finished run; choose another --out or remove it")
    model = open_model(command.model, command)
    loader = open_training_data(model, command, command, augment=command.train)
    evaluation = open_evaluation_data(model, command, command.batch_size)
    table_file = out / "latency_table.json"
    if command.resume and table_file.exists():
        table = LatencyTable.load(table_file)
    else:
        table = open_table(model, command, command.bundle_sizes, progress)
    table.save(table_file)
    cnn, renormalise = _cnn_teacher(command, model)
    result = prune(
        model,
        loader,
        command,
        table,
        cnn_teacher=cnn,
        renormalise=renormalise,
        out=out,
        resume=command.resume,
        progress=progress,
    )
    write_csv(out / "history.csv", result.history)
    if command.finetune_epochs:
        train = open_training_data(model, command, command)
        for pruned in result.snapshots:
            _finetune_snapshot(pruned, train, command, result.dense, cnn, renormalise, out, progress)
    images = sample_images(result.dense, command.latency_batch)
    times = time_models([result.dense, *(p.model for p in result.snapshots)], images, command.latency_seconds / 4)
    dense = _size(result.dense) | {"latency_ms": times[0], "top1": None}
    if evaluation is not None:
        dense["top1"] = accuracy(result.dense, evaluation, amp=command.amp, progress=progress)["top1"]
    rows = []
    for pruned, ms in zip(result.snapshots, times[1:], strict=True):
        row = {"target": pruned.target, "predicted_ratio": pruned.predicted_ratio, "measured_ratio": ms / times[0]}
        row |= _size(pruned.model) | {"latency_ms": ms, "top1": None}
        if evaluation is not None:
            row["top1"] = accuracy(pruned.model, evaluation, amp=command.amp, progress=progress)["top1"]
        pruned.metrics |= {k: v for k, v in row.items() if k not in ("target", "predicted_ratio")}
        path = pruned.save(out / f"target-{pruned.target:g}")
        rows.append(row | {"path": str(path)})
    found = {
        "model": command.model,
        "criterion": command.criterion,
        "targets": [p.target for p in result.snapshots],
        "dense": dense,
        "snapshots": rows,
        "latency_batch": command.latency_batch,
        "device": str(images.device),
        "seconds": time.monotonic() - start,
        "recipe": dataclasses.asdict(command),
    }
    write_result(out, found)
    for state in out.glob("*_state*.safetensors"):
        state.unlink()
    return found


def _cnn_teacher(config: TrainingConfig, model: nn.Module):
    """The CNN teacher of a recipe, and the change of image normalisation towards it."""
    if not config.cnn_teacher:
        return None, None
    device = next(model.parameters()).device
    try:
        teacher = timm.create_model(config.cnn_teacher, pretrained=True).to(device)
    except Exception as e:
        raise ValueError(f"CNN teacher {config.cnn_teacher!r} cannot be had: {e}") from None
    if teacher.num_classes != model.num_classes:
        raise ValueError(
            f"CNN teacher {config.cnn_teacher!r} has {teacher.num_classes} classes, the model {model.num_classes}"
        )
    mine, theirs = (resolve_data_config(model=m) for m in (model, teacher))
    return frozen(teacher), renormalisation(mine, theirs, device)


def _finetune_snapshot(
    pruned: Pruned, loader, command: PruneCommand, dense, cnn, renormalise, out: Path, progress: Progress
) -> None:
    """Finetune one snapshot in its place, unless an interrupted run has done so already."""
    if pruned.metrics.get("finetuned_epochs") == command.finetune_epochs:
        return
    config = command.finetuning()
    pruned.model = finetune(
        pruned.model.train(),
        loader,
        config,
        teacher=dense if config.distill_weight else None,
        cnn_teacher=cnn,
        renormalise=renormalise,
        state_file=out / f"finetune_state_{pruned.target:g}.safetensors",
        resume=command.resume,
        progress=progress,
    )
    pruned.metrics["finetuned_epochs"] = command.finetune_epochs
    pruned.save(out / f"target-{pruned.target:g}")


def run_finetune(name: str, command: FinetuneCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit finetune`: train a compact model, or with `scratch` a new one, and save it as a snapshot."""
    start = time.monotonic()
    out = Path(command.out)
    if (out / snapshot.SPEC).exists() and not command.resume:
        raise ValueError(f"{out} holds a snapshot already; choose another --out or remove it")
    model = open_model(name, command, scratch=command.scratch)
    loader = open_training_data(model, command, command)
    evaluation = open_evaluation_data(model, command, command.batch_size)
    teacher = None
    if command.teacher:
        flags = ModelFlags(checkpoint=command.teacher_checkpoint, device=command.device)
        teacher = frozen(open_model(command.teacher, flags))
    cnn, renormalise = _cnn_teacher(command, model)
    before = None if evaluation is None else accuracy(model, evaluation, progress=progress)["top1"]
    state_file = out.with_name(f"{out.name}_state.safetensors")
    model = finetune(
        model,
        loader,
        command,
        teacher=teacher,
        cnn_teacher=cnn,
        renormalise=renormalise,
        state_file=state_file,
        resume=command.resume,
        progress=progress,
    )
    found = {"model": name, "epochs": command.epochs, "top1_before": before, "top1": None} | _size(model)
    if evaluation is not None:
        found["top1"] = accuracy(model, evaluation, progress=progress)["top1"]
    snapshot.save(out, model, found)
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
    state_file.unlink(missing_ok=True)
    return found


def run_evaluate(name: str, command: EvaluateCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit evaluate`: accuracy and throughput."""
    model = open_model(name, command)
    evaluation = open_evaluation_data(model, command, command.batch_size)
    if evaluation is None:
        raise ValueError("--data is missing: a folder of class folders, or a timm data set as torch/cifar10:FOLDER")
    found = {"model": name} | accuracy(model, evaluation, amp=command.amp, progress=progress)
    if command.out:
        write_result(command.out, found)
    return found


def run_compare(names: Sequence[str], command: CompareCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit compare`: several models in one run, latency measured in turn."""
    models = [open_model(name, command) for name in names]
    sizes = {tuple(resolve_data_config(model=m)["input_size"]) for m in models}
    if len(sizes) > 1:
        raise ValueError(f"the models take images of different sizes {sorted(sizes)}; compare ones that take the same")
    table = open_table(models[0], command, _smallest(models), progress)
    images = sample_images(models[0], command.latency_batch)
    times = time_models(models, images, command.seconds)
    rows = []
    for name, model, ms in zip(names, models, times, strict=True):
        row = {"name": name} | _size(model)
        row |= {"predicted_ratio": _predicted(table, model), "measured_ratio": ms / times[0], "latency_ms": ms}
        row |= {"speedup": times[0] / ms, "peak_memory": peak_memory(model.eval(), images)}
        evaluation = open_evaluation_data(model, command, command.batch_size)
        if evaluation is not None:
            found = accuracy(model, evaluation, progress=progress)
            row |= {"top1": found["top1"], "top5": found["top5"]}
        rows.append(row)
    result = {"models": rows, "latency_batch": command.latency_batch, "device": str(images.device)}
    if command.out:
        write_result(command.out, result)
        write_csv(Path(command.out) / "compare.csv", rows)
    return result


def _smallest(models: Sequence[nn.Module]) -> dict[str, int]:
    """Bundle sizes whose grid begins at or below the narrowest width of any model."""
    blocks = [b for m in models for b in _widths(m)]
    return {kind: min(BUNDLE_SIZES[kind], *(getattr(b, kind) for b in blocks)) for kind in KINDS}


def _predicted(table: LatencyTable, model: nn.Module) -> float | None:
    """The table's word on a model, where it reaches that far."""
    try:
        return table.ratio(_widths(model))
    except ValueError:
        return None


def run_latency(command: LatencyCommand, progress: Progress = silent) -> tuple[LatencyTable, dict[str, Any]]:
    """`nvit latency`: measure a table, or read one."""
    if command.table and command.table != "analytic":
        table = LatencyTable.load(command.table)
    else:
        model = open_model(command.model, dataclasses.replace(command, pretrained=False)).to(
            getattr(torch, command.dtype)
        )
        flags = LatencyFlags(
            table=command.table, latency_batch=command.latency_batch, latency_seconds=command.latency_seconds
        )
        table = open_table(model, flags, BUNDLE_SIZES, progress)
    setting = None if table.setting is None else dataclasses.asdict(table.setting)
    found = {"model": command.model, "dense_ms": table.dense_ms, "setting": setting} | table.slopes()
    if command.out:
        table.save(Path(command.out) / "latency_table.json")
        write_result(command.out, found)
    return table, found


def run_widths(names: Sequence[str], command: WidthsCommand) -> dict[str, Any]:
    """`nvit analyze widths`: the paper's Fig. 4 for any snapshots."""
    models = {name: snapshot.load_spec(snapshot.BUNDLED if name == DIGITS else name).blocks for name in names}
    rows = analysis.width_rows(models)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "widths.csv", rows)
    analysis.plot_widths(models, out / "widths.png")
    result = {"widths": rows, "csv": str(out / "widths.csv"), "figure": str(out / "widths.png")}
    write_result(out, result)
    return result
