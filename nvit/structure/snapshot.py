"""A compact model on disk: `spec.json`, `weights.safetensors`, `metrics.json`. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import adapters
from ..layers import prunable_layers
from ..spec import Group, ViTSpec
from ..utils.files import write_atomically
from ..utils.tensors import write_tensors
from .compact import compact, cut
from .masks import Masks, full_masks, weight_masks, widths

BUNDLED = Path(__file__).parents[1] / "bundled" / "digits_vit"
"""The snapshot of the small ViT that comes with the package."""

SPEC, WEIGHTS, METRICS = "spec.json", "weights.safetensors", "metrics.json"

FINISHERS: list[Callable[[nn.Module], None]] = []
"""What `load` does to a loaded model at last, for speed alone: outputs stay equal. Rooms above this one add to it when
they are imported, as `nvit.sparse24` does (and `import nvit` imports that), so that nothing is imported upwards."""


def spec_of(model: nn.Module) -> ViTSpec:
    """The spec of a prepared model as it stands: dense or compact, not masked."""
    adapter = adapters.find(model)
    groups = adapter.groups(model)
    spec = adapter.spec(model, widths(groups, full_masks(groups)))
    kept = {
        layer.axes[axis]: units for layer in prunable_layers(model).values() for axis, units in layer.places.items()
    }
    return replace(spec, sparse=getattr(model, "sparse24", ()), kept=kept)


def save(path: str | Path, model: nn.Module, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write a compact model as a snapshot folder. The folder appears whole or not at all.

    Args:
        path: the folder; an older snapshot there is replaced.
        model: a prepared model (see `nvit.prune`), dense or compact.
        metrics: plain values for `metrics.json`.

    Raises:
        OSError: the disk is full or the folder cannot be written.
        ValueError: `path` exists and is no snapshot.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / SPEC).exists() or not any(path.iterdir()))):
        raise ValueError(f"{path} exists and is not a snapshot; choose another folder")
    part, old = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        write_tensors(part / WEIGHTS, state)
        write_atomically(part / METRICS, (json.dumps(dict(metrics or {}), indent=2) + "\n").encode())
        write_atomically(part / SPEC, spec_of(model).to_json().encode())
        # Two renames, so that a kill in between leaves no folder rather than half of one.
        if path.exists():
            path.replace(old)
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return path


def is_snapshot(path: str | Path) -> bool:
    return (Path(path) / SPEC).exists()


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, sparse: bool = True
) -> nn.Module:
    """The compact model of a snapshot folder, in eval mode, ready for inference.

    Args:
        dtype: of the weights; as saved when None.
        sparse: on a GPU that can, run 2:4 projections on sparse tensor cores where that is measured faster; elsewhere
            they run as dense weights with zeros, with equal outputs. `model.sparse24_choices` says what was chosen.
            `FINISHERS` do it. Without it weights stay plain tensors, to train or to save again.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others; one line that names it.
    """
    path = Path(path)
    for name in (SPEC, WEIGHTS):
        if not (path / name).is_file():
            found = sorted(p.name for p in path.iterdir()) if path.is_dir() else "no such folder"
            raise ValueError(f"{path} is not a snapshot: {name} is missing (found {found})")
    spec = load_spec(path)
    try:
        model, masks, shapes = _skeleton(spec)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path / SPEC} is damaged or from another version: {e}") from None
    try:
        weights = load_file(path / WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path / WEIGHTS} is damaged: {e}") from None
    _check(path, shapes, weights, spec.sparse)
    adapter = adapters.FAMILIES[spec.family]
    adapter.resize(model, weights, masks)
    model.sparse24 = spec.sparse
    model = model.eval() if dtype is None else model.eval().to(dtype)
    for finish in FINISHERS if sparse else ():
        finish(model)
    return model


def load_spec(path: str | Path) -> ViTSpec:
    """The spec of a snapshot folder.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = Path(path) / SPEC
    if not file.is_file():
        raise ValueError(f"{path} is not a snapshot: {SPEC} is missing")
    try:
        return ViTSpec.from_json(file.read_text())
    except (ValueError, UnicodeDecodeError, TypeError, KeyError) as e:
        raise ValueError(f"{file} is damaged or from another version: {e}") from None


def load_metrics(path: str | Path) -> dict[str, Any]:
    """The plain values a snapshot was saved with; empty where there are none."""
    file = Path(path) / METRICS
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is damaged: {e}") from None


def fresh(spec: ViTSpec) -> nn.Module:
    """A newly initialised model of these widths, to train from scratch."""
    model = adapters.FAMILIES[spec.family].build(spec, "cpu")
    groups, masks = _kept(spec, model)
    return compact(model, groups, masks)


def _kept(spec: ViTSpec, model: nn.Module) -> tuple[list[Group], Masks]:
    """Masks on a spec's dense model that leave as many units of every group as the spec says: the ones it lists, or
    the first."""
    groups = adapters.FAMILIES[spec.family].groups(model)
    depth = 1 + max(b for g in groups for b in g.blocks)
    if len(spec.blocks) != depth:
        raise ValueError(f"it lists {len(spec.blocks)} blocks for a model of {depth}")
    masks = {}
    for g in groups:
        found = {getattr(spec.blocks[b], g.kind) for b in g.blocks}
        if len(found) > 1 or max(found) > g.size:
            raise ValueError(f"{g.name} has widths {sorted(found)}; one width of at most {g.size} was expected")
        width = found.pop()
        units = spec.kept.get(g.name, range(width))
        if len(set(units)) != width or not all(type(u) is int and 0 <= u < g.size for u in units):
            raise ValueError(f"{g.name} keeps the units {list(units)[:4]} …; {width} of {g.size} were expected")
        masks[g.name] = torch.zeros(g.size, dtype=torch.bool).index_fill_(0, torch.tensor(units), True)
    return groups, masks


def _skeleton(spec: ViTSpec) -> tuple[nn.Module, Masks, dict[str, torch.Size]]:
    """The dense meta model of a spec, what stays of it, and the shapes its parameters have after the cut."""
    if spec.family not in adapters.FAMILIES:
        raise ValueError(f"family {spec.family!r} is unknown; this version knows {', '.join(adapters.FAMILIES)}")
    model = adapters.FAMILIES[spec.family].build(spec)
    groups, masks = _kept(spec, model)
    params = dict(model.named_parameters())
    return model, masks, {n: t.shape for n, t in cut(params, weight_masks(params, groups, masks)).items()}


def _check(path: Path, shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], sparse: Sequence[str]) -> None:
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"{path / WEIGHTS} does not fit {SPEC}: "
            + "; ".join(f"{what} {names[:3]}" for what, names in (("missing", missing), ("unknown", unknown)) if names)
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{path / WEIGHTS} does not fit {SPEC}: {name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
            )
    for name in sparse:
        w = weights.get(name)
        if w is None or w.dim() != 2 or w.shape[1] % 4 or int((w.unflatten(1, (-1, 4)) != 0).sum(-1).max()) > 2:
            raise ValueError(
                f"{path / WEIGHTS} does not fit {SPEC}: {name} is listed as 2:4 sparse but keeps more than two of four "
                "neighbours along its input; sparsify the dense snapshot again"
            )
