"""What the folder of a run, a comparison, a finetuning or a snapshot holds, whole or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..prune.folder import RunFolder
from ..prune.states import states_in
from ..structure import snapshot
from ..utils.files import read_json, short
from ..utils.report import RESULT
from .model import Model, Run
from .parts import History, Table, history_of, left_in, numbers, plain, table_of

TAKES = "nvit report takes the folder that nvit prune, demo, finetune or compare wrote, or a snapshot"


def read(path: str | Path) -> Run:
    """What a folder says of a run; what is missing in it is said in `Run.absent`.

    Raises:
        ValueError: no such folder, nothing in it that a report could be of, or a damaged `result.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{path} {what}; {TAKES}")
    result = _result(folder)
    if result is None:
        return _without_result(folder)
    if isinstance(result.get("snapshots"), list):
        return _pruned(folder, result)
    if isinstance(result.get("models"), list):
        return _compared(folder, result)
    if snapshot.is_snapshot(folder):
        return _snapshot(folder, result)
    raise ValueError(f"{folder / RESULT} has the keys {short(sorted(result))}, which are of another command; {TAKES}")


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / RESULT
    if not file.exists():
        return None
    try:
        found = read_json(file)
    except ValueError as e:
        raise ValueError(f"{file} cannot be read: {e}; run the command again, or remove the file") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object; run the command again")
    return found


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _pruned(folder: Path, result: Mapping[str, Any]) -> Run:
    """A run that came to its end."""
    absent: list[str] = []
    table, history = table_of(folder), history_of(folder)
    dense = Model("dense", numbers(result.get("dense")), dense=True, widths=table.dense)
    models = [dense]
    for raw in result["snapshots"]:
        row = numbers(raw)
        if "target" not in row:
            absent.append(f"an entry of {RESULT} has no target, and was left out")
            continue
        left, lacks = left_in(folder / f"target-{row['target']:g}")
        absent += lacks
        models.append(Model(f"pruned to {row['target']:g}", row, row["target"], **left))
    environment = plain(result.get("environment")) or table.setting
    setting = plain({k: result.get(k) for k in ("device", "latency_batch", "latency_dtype", "latency_mode")})
    if not environment:
        absent.append("the run does not say which machine and versions it was on")
    seconds = numbers(result).get("seconds")
    return _run(
        folder,
        "prune",
        models,
        absent,
        table,
        history,
        setting=setting,
        recipe=plain(result.get("recipe")),
        environment=environment,
        title=str(result.get("model", "")),
        seconds=seconds,
    )


def _without_result(folder: Path) -> Run:
    """An interrupted run, from the snapshots it got to, or a snapshot alone."""
    found = RunFolder(folder).snapshots()
    if not found and snapshot.is_snapshot(folder):
        return _snapshot(folder, {})
    table, history = table_of(folder), history_of(folder)
    began = [*states_in(folder), *(folder / n for n in ("latency_table.json", "history.csv") if (folder / n).exists())]
    if not found and not began:
        raise ValueError(f"{folder} holds no {RESULT} and no snapshot; {TAKES}")
    absent = [f"the run did not come to its end: there is no {RESULT}; the same command with --resume goes on"]
    if not found:
        absent.append("it had not met any target yet: there is no snapshot")
    models = [Model("dense", {}, dense=True, widths=table.dense)] if table.dense else []
    for target, where in sorted(found.items(), reverse=True):
        row, lacks = _metrics(where)
        left, more = left_in(where)
        absent += lacks + more
        models.append(Model(f"pruned to {target:g}", row, target, **left))
    return _run(folder, "prune", models, absent, table, history, environment=table.setting)


def _snapshot(folder: Path, result: Mapping[str, Any]) -> Run:
    """A snapshot, with what a finetuning found of it."""
    row, absent = _metrics(folder)
    left, lacks = left_in(folder)
    try:
        title, dense = snapshot.load_spec(folder).name, _dense_widths(folder)
    except ValueError as e:
        title, dense = "", ()
        lacks = [short(e)]
    absent += lacks
    metric = str(result.get("metric", ""))
    models = []
    before = numbers({metric: result.get(f"{metric}_before"), f"{metric}_se": result.get(f"{metric}_before_se")})
    if before:
        models.append(Model("before finetuning", before))
    row = row | numbers(result)
    name = "after finetuning" if before else f"snapshot {_name(folder)}"
    models.append(Model(name, row, row.get("target"), **left))
    kind = "finetune" if "epochs" in result else "snapshot"
    if kind == "snapshot":
        absent.append("this is a snapshot alone: the dense model, the history and the recipe of its run are not here")
    return Run(
        _name(folder),
        kind,
        tuple(models),
        tuple(absent),
        dense,
        recipe=plain(result.get("recipe")),
        environment=plain(result.get("environment")),
        title=title or str(result.get("model", "")),
        seconds=numbers(result).get("seconds"),
    )


def _compared(folder: Path, result: Mapping[str, Any]) -> Run:
    """Models side by side; the first is what the others are measured against."""
    models = []
    for i, raw in enumerate(result["models"]):
        name, row = str(raw.get("name", i + 1)) if isinstance(raw, Mapping) else str(i + 1), numbers(raw)
        left = left_in(Path(name))[0] if snapshot.is_snapshot(name) else {}
        models.append(Model(name, row, dense=i == 0, **left))
    setting = plain({k: result.get(k) for k in ("device", "latency_batch", "latency_dtype", "latency_mode")})
    return Run(
        _name(folder),
        "compare",
        tuple(models),
        dense_widths=models[0].widths if models else (),
        setting=setting,
        environment=plain(result.get("environment")),
        title=models[0].name if models else "",
    )


def _run(
    folder: Path, kind: str, models: list[Model], absent: list[str], table: Table, history: History, **more: Any
) -> Run:
    pruned = [m for m in models if not m.dense]
    run = Run(_name(folder), kind, tuple(models), (), table.dense, history=history.rows, **more)
    absent = [*absent, *table.absent, *history.absent]
    if pruned and run.metric is None:
        absent.append("accuracy was not measured: the run had no evaluation images (--eval-data)")
    if pruned and not any("measured_ratio" in m.row for m in pruned):
        absent.append("latency is predicted and was not measured")
    return Run(**(vars(run) | {"absent": tuple(dict.fromkeys(absent))}))


def _metrics(folder: Path) -> tuple[dict[str, float], list[str]]:
    try:
        return numbers(snapshot.load_metrics(folder)), []
    except (ValueError, OSError) as e:
        return {}, [short(e)]


def _dense_widths(folder: Path):
    from ..structure.skeleton import dense_blocks

    return dense_blocks(snapshot.load_spec(folder))
