"""Each command as one library call: from its flags to models, data, tables and a result."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import adapters, parallel, sparse24
from ..analysis import correlation, widths
from ..analysis.evaluate import accuracy, macs, parameters, peak_memory
from ..latency.clock import time_models
from ..latency.table import LatencyTable
from ..prune.api import Pruned, prune
from ..prune.budget import Budget
from ..prune.pruner import prunable_groups
from ..spec import BUNDLE_SIZES, KINDS
from ..structure import snapshot
from ..structure.masks import unmasked_
from ..training.distill import frozen
from ..training.finetune import finetune
from ..utils.memory import Meter
from ..utils.progress import Progress, silent
from ..utils.report import write_csv, write_result
from .commands import (
    DIGITS,
    CompareCommand,
    CorrelationCommand,
    EvaluateCommand,
    FinetuneCommand,
    LatencyCommand,
    LatencyFlags,
    ModelFlags,
    PruneCommand,
    SparsifyCommand,
    WidthsCommand,
)
from .inputs import (
    model_widths,
    open_cnn_teacher,
    open_evaluation_data,
    open_model,
    open_table,
    open_training_data,
    sample_images,
)


def _size(model: nn.Module) -> dict[str, Any]:
    size = adapters.preprocess(model)["input_size"]
    return {"params": parameters(model), "macs": macs(model, size)}


def run_prune(command: PruneCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit prune`: dense accuracy, pruning, finetuning, accuracy and latency of each snapshot.

    Under torchrun every rank prunes and finetunes; rank 0 alone measures, evaluates, writes, and has a result.
    """
    start = time.monotonic()
    out = Path(command.out)
    if parallel.from_main((out / "result.json").exists) and not command.resume:
        raise ValueError(f"{out} holds a finished run; choose another --out or remove it")
    torch.manual_seed(command.seed)  # of a model without weights of its own
    model = open_model(command.model, command)
    loader = open_training_data(model, command, command, augment=command.train)
    evaluation = open_evaluation_data(model, command, _evaluation_batch(model, command))
    meter = Meter(next(model.parameters()).device) if command.budget else None
    table = parallel.from_main(lambda: _own_table(model, command, out / "latency_table.json", progress))
    cnn, renormalise = open_cnn_teacher(command, model)
    dense = _size(model) | {"latency_ms": None, "top1": None}
    if evaluation is not None and parallel.main():
        dense["top1"] = accuracy(model, evaluation, amp=command.amp, progress=progress)["top1"]
    before = meter.peak if meter else 0
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
    parallel.from_main(lambda: write_csv(out / "history.csv", result.history))
    if command.finetune_epochs:
        train = open_training_data(model, command, command)
        for pruned in result.snapshots:
            _finetune_snapshot(pruned, train, command, result.dense, cnn, renormalise, out, progress)
    if not parallel.main():
        return {}
    reference = unmasked_(model) if result.dense is None else result.dense
    images = sample_images(reference, command.latency_batch)
    times = time_models([reference, *(p.model for p in result.snapshots)], images, command.latency_seconds / 4)
    dense["latency_ms"] = times[0]
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
        "criterion": result.criterion,
        "targets": [p.target for p in result.snapshots],
        "dense": dense,
        "snapshots": rows,
        "latency_batch": command.latency_batch,
        "device": str(images.device),
        "seconds": time.monotonic() - start,
        "recipe": dataclasses.asdict(command),
    }
    if meter:
        found["memory"] = result.memory | {"peak": max(before, meter.peak)}
    if command.refit:
        refits = [row for row in result.history if "refit_seconds" in row]
        found["refit_seconds"] = sum(row["refit_seconds"] for row in refits)
        found["refit_peak_memory"] = max(row["peak_memory"] for row in refits)
    write_result(out, found)
    for state in out.glob("*_state*.safetensors"):
        state.unlink()
    return found


def _own_table(model: nn.Module, command: PruneCommand, file: Path, progress: Progress) -> LatencyTable:
    """The table of a run, kept in its folder: the one an interrupted run began with."""
    if command.resume and file.exists():
        return LatencyTable.load(file)
    table = open_table(model, command, command.bundle_sizes, progress)
    table.save(file)
    return table


def _evaluation_batch(model: nn.Module, command: PruneCommand) -> int:
    """Images a forward pass while evaluating: under a budget, as many as fit in it beside compact models.

    Raises:
        ValueError: the batch of the latency measurement does not fit.
    """
    if not command.budget:
        return command.batch_size
    fits = Budget(command.budget, next(model.parameters()).device).forward_images
    size, targets = adapters.preprocess(model)["input_size"], sum(command.latency_target)
    if (most := fits(model, size, command.latency_batch, targets)) < command.latency_batch:
        raise ValueError(
            f"budget {command.budget} does not hold {command.latency_batch} images while latency is measured; give "
            + (f"--latency-batch {most} or less, or a larger budget" if most else "a larger budget")
        )
    return max(1, fits(model, size, command.batch_size, targets))


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
    parallel.from_main(lambda: pruned.save(out / f"target-{pruned.target:g}"))


def run_finetune(name: str, command: FinetuneCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit finetune`: train a compact model, or with `scratch` a new one, and save it as a snapshot.

    Under torchrun every rank trains; rank 0 alone evaluates, writes, and has a result.
    """
    start = time.monotonic()
    out = Path(command.out)
    if parallel.from_main((out / snapshot.SPEC).exists) and not command.resume:
        raise ValueError(f"{out} holds a snapshot already; choose another --out or remove it")
    torch.manual_seed(command.seed)
    model = open_model(name, command, scratch=command.scratch)
    loader = open_training_data(model, command, command)
    evaluation = open_evaluation_data(model, command, command.batch_size)
    teacher = None
    if command.teacher:
        flags = ModelFlags(checkpoint=command.teacher_checkpoint, device=command.device)
        teacher = frozen(open_model(command.teacher, flags))
    cnn, renormalise = open_cnn_teacher(command, model)
    before = None
    if evaluation is not None and parallel.main():
        before = accuracy(model, evaluation, progress=progress)["top1"]
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
    if not parallel.main():
        return {}
    found = {"model": name, "epochs": command.epochs, "top1_before": before, "top1": None} | _size(model)
    if evaluation is not None:
        found["top1"] = accuracy(model, evaluation, progress=progress)["top1"]
    snapshot.save(out, model, found)
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
    state_file.unlink(missing_ok=True)
    return found


def run_sparsify(name: str, command: SparsifyCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit sparsify`: 2:4 on the projections, sparse only where a GPU was measured faster; saved as a snapshot."""
    start = time.monotonic()
    out = Path(command.out)
    if (out / snapshot.SPEC).exists():
        raise ValueError(f"{out} holds a snapshot already; choose another --out or remove it")
    model = open_model(name, command)
    evaluation = open_evaluation_data(model, command, command.batch_size)
    loader = open_training_data(model, command, command) if command.epochs else None

    def top1() -> float | None:
        return None if evaluation is None else accuracy(model, evaluation, progress=progress)["top1"]

    found: dict[str, Any] = {"model": name, "top1_dense": top1()}
    teacher = frozen(copy.deepcopy(model)) if command.epochs and command.distill_weight else None
    if teacher is not None and command.teacher:
        flags = ModelFlags(checkpoint=command.teacher_checkpoint, device=command.device)
        teacher = frozen(open_model(command.teacher, flags))
    found["permuted"] = sparse24.permute_(model, command.permute_seconds, progress) if command.permute else []
    layers = sparse24.measure(
        model, sample_images(model, command.latency_batch), getattr(torch, command.dtype), progress
    )
    masks = {n: m for n, m in sparse24.masks_2to4(model).items() if layers[n].masked}
    before = {n: p.weight.detach().abs().sum() for n, p in sparse24.projections(model).items()}
    sparse24.apply_masks_(model, masks)
    model.sparse24 = tuple(masks)
    found |= {"top1_sparse": top1(), "top1": None}
    if command.epochs:
        model = finetune(
            model,
            loader,
            command,
            teacher=teacher,
            constrain=lambda: sparse24.apply_masks_(model, masks),
            progress=progress,
        )
    found["top1"] = top1() if command.epochs else found["top1_sparse"]
    found["layers"] = [
        dataclasses.asdict(layers[n])
        | {"shape": list(p.weight.shape), "kept": float(p.weight.detach().abs().sum() / before[n])}
        for n, p in sparse24.projections(model).items()
    ]
    found["sparse_layers"] = len(masks)
    snapshot.save(out, model, {k: v for k, v in found.items() if k != "layers"})
    found |= {"path": str(out), "seconds": time.monotonic() - start}
    write_result(out, found)
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
    sizes = {tuple(adapters.preprocess(m)["input_size"]) for m in models}
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
    blocks = [b for m in models for b in model_widths(m)]
    return {kind: min(BUNDLE_SIZES[kind], *(getattr(b, kind) for b in blocks)) for kind in KINDS}


def _predicted(table: LatencyTable, model: nn.Module) -> float | None:
    """The table's word on a model, where it reaches that far."""
    try:
        return table.ratio(model_widths(model))
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
    rows = widths.width_rows(models)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "widths.csv", rows)
    widths.plot_widths(models, out / "widths.png")
    result = {"widths": rows, "csv": str(out / "widths.csv"), "figure": str(out / "widths.png")}
    write_result(out, result)
    return result


def run_correlation(name: str, command: CorrelationCommand, progress: Progress = silent) -> dict[str, Any]:
    """`nvit analyze correlation`: the paper's appendix B.5 for any model and any criteria."""
    start = time.monotonic()
    model = open_model(name, command)
    config = command.scoring()
    loader = open_training_data(model, command, config, augment=False)
    batches = list(itertools.islice(loader, command.batches))
    groups = adapters.find(model).groups(model)
    free = prunable_groups(groups, config.only, config.freeze)
    scores = correlation.saliencies(model, batches, command.criterion, config, progress)
    bundles = correlation.propose(scores, free, command.bundles)
    changes = correlation.loss_changes(model, groups, bundles, batches, progress)
    rows = correlation.rows_of(bundles, scores, changes)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "correlation.csv", rows)
    correlation.plot(rows, command.criterion, out / "correlation.png")
    found = {
        "model": name,
        "correlations": correlation.rank_correlations(rows, command.criterion),
        "bundles": len(rows),
        "images": sum(len(labels) for _, labels in batches),
        "csv": str(out / "correlation.csv"),
        "figure": str(out / "correlation.png"),
        "seconds": time.monotonic() - start,
    }
    write_result(out, found)
    return found
