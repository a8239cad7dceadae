"""A model card made of what a snapshot and its run say of themselves, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..latency.table import LatencyTable
from ..spec import KINDS, TITLES, ViTSpec
from ..structure.skeleton import dense_blocks
from ..structure.snapshot import load_metrics, load_spec
from ..utils.files import read_json
from ..utils.report import FORMATS, OFF, RESULT

UNKNOWN = "unknown"
"""What a card says of a licence that nobody named; the Hub has the same word."""

_NOT_SAID = (
    "unknown: nobody named it when this card was made. A pruned model is made of the weights of another, whose licence "
    "goes on applying; ask whoever published them."
)

LATENCY_TABLE = "latency_table.json"


def model_card(
    folder: str | Path, repo: str = "", *, license: str = UNKNOWN, base_model: str | None = None, data: str = ""
) -> ModelCard:
    """The card of a snapshot: what it is, how it was pruned, accuracy and latency as measured, widths, how to load it.

    A folder `target-…` of a run has the run's `result.json` and latency table beside it, which say the recipe, the
    dense model's numbers and the device.

    Args:
        repo: where it is going to lie, for the line that loads it; the folder's name when empty.
        license: of the source weights, as the Hub spells it (`apache-2.0`); said to be unknown unless given.
        base_model: the Hub's name of the model that was pruned.
        data: what accuracy was measured on, in words; the run's evaluation folder by name when empty.

    Raises:
        ValueError: no snapshot, or a damaged one.

    >>> card = nvit.hub.model_card(nvit.BUNDLED, license="cc-by-4.0")
    >>> card.data.license, "top-1 % | 97.22" in card.content
    ('cc-by-4.0', True)
    """
    folder = Path(folder)
    spec, metrics = load_spec(folder), load_metrics(folder)
    run, table = _run_of(folder)
    about = ModelCardData(
        license=license,
        library_name="nvit",
        base_model=base_model,
        pipeline_tag="image-classification" if "top1" in metrics else None,
        tags=["nvit", "pruning", "vision-transformer"],
    )
    recipe = run.get("recipe", {})
    parts = [
        f"# {_plain(repo or folder.resolve().name)}",
        f"{_plain(spec.name or spec.architecture)}, pruned with nvit {__version__} to {_aim(metrics)}. It is an "
        f"ordinary PyTorch model ({_plain(spec.architecture)}) with narrower layers.",
        "## Use",
        f'```python\nimport nvit\n\nmodel = nvit.load("{f"hf-hub:{_plain(repo)}" if repo else _plain(folder.name)}")  '
        f"# an nn.Module in eval mode\nimages = nvit.adapters.preprocess(model)  # size, mean, std, crop\n```",
        "## What was measured",
        _numbers(run.get("dense", {}), metrics),
        f"Accuracy: {_accuracy(metrics, recipe, data)}. Latency: {_latency(metrics, run, table)}.",
        "## Widths",
        _widths(dense_blocks(spec), spec),
        "## How it was made",
        _recipe(run),
        "## Licence",
        f"Of the source weights: {_NOT_SAID if license == UNKNOWN else _plain(license)}.".replace("..", "."),
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _run_of(folder: Path) -> tuple[dict[str, Any], LatencyTable | None]:
    """What the run that a snapshot lies in found, and its table; nothing where there is none."""
    if not folder.name.startswith("target-"):
        return {}, None
    try:
        run = read_json(folder.parent / RESULT)
        return run if isinstance(run, dict) else {}, LatencyTable.load(folder.parent / LATENCY_TABLE)
    except (ValueError, OSError):
        return {}, None


def _plain(text: Any) -> str:
    """A user's words inside Markdown: on one line, nothing of them a mark."""
    line = " ".join(str(text).split())
    for mark in '\\`*[]<>|"':
        line = line.replace(mark, f"&#{ord(mark)};")
    return line


def _aim(metrics: Mapping[str, Any]) -> str:
    if "target" not in metrics:
        return "the widths below"
    met = {True: ", met", False: ", missed"}.get(metrics.get("met"), "")
    by = {"clock": " as measured", "table": " by the latency table"}.get(metrics.get("judged_by"), "")
    return f"{100 * metrics['target']:g} % of its latency{met}{by if met else ''}"


def _numbers(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    keys = [k for k in FORMATS if isinstance(pruned.get(k), (int, float))]
    if not keys:
        return "Nothing: its metrics are empty."
    columns = [("dense", dense), ("pruned", pruned)] if any(dense.get(k) is not None for k in keys) else [("", pruned)]
    rows = [[FORMATS[k][0], *(_cell(c, k) for _, c in columns)] for k in keys]
    return _table(["", *(name for name, _ in columns)], rows)


def _cell(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row.get(key), (int, float)):
        return "–"
    off = row.get(OFF.get(key, ""))
    return FORMATS[key][1](row[key]) + (f" ± {FORMATS[key][1](off)}" if off else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _accuracy(metrics: Mapping[str, Any], recipe: Mapping[str, Any], data: str) -> str:
    if not any(k in metrics for k in ("top1", "mAP", "accuracy", "mae", "rmse", "cosine")):
        return "not measured"
    where = data or Path(recipe.get("eval_data") or recipe.get("data") or "").name
    return f"on {_plain(where)}" if where else "on data that nobody named"


def _latency(metrics: Mapping[str, Any], run: Mapping[str, Any], table: LatencyTable | None) -> str:
    if "latency_ms" not in metrics:
        return "not measured"
    setting = table.setting.device if table is not None and table.setting is not None else run.get("device")
    if not setting:
        return "on a device that nobody named; measure it on yours with `nvit compare`"
    batch, mode, dtype = (run.get(f"latency_{k}", "?") for k in ("batch", "mode", "dtype"))
    return f"milliseconds a batch of {batch} images, {_plain(dtype)}, {_plain(mode)}, on {_plain(setting)}"


def _widths(dense: Sequence[Any], spec: ViTSpec) -> str:
    rows = [
        [str(i), *(f"{getattr(now, k)} of {getattr(was, k)}" for k in KINDS)]
        for i, (was, now) in enumerate(zip(dense, spec.blocks, strict=True))
    ]
    return _table(["block", *(TITLES[k] for k in KINDS)], rows)


def _recipe(run: Mapping[str, Any]) -> str:
    if not run:
        return "Nobody kept the recipe beside the snapshot."
    settings = {k: v for k, v in run.get("recipe", {}).items() if v not in ("", None, False, [], 0, 0.0)}
    hidden = ("out", "data", "eval_data", "targets", "eval_targets", "checkpoint", "class_map", "dump_config", "table")
    rows = [[f"`{_plain(k)}`", _plain(v)] for k, v in settings.items() if k not in hidden]
    said = f"`nvit prune`, criterion {_plain(run.get('criterion', '?'))}, {run.get('seconds', 0):.0f} s."
    return f"{said}\n\n{_table(['setting', 'value'], rows)}"
