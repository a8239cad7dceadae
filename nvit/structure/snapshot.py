"""A compact model on disk: `spec.json`, `weights.safetensors`, `metrics.json`, and `manifest.json`, which says what the
others were when they were saved. No pickle."""

from __future__ import annotations

import json
import shutil
import warnings
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
from ..spec import NewerFormat, ViTSpec
from ..utils.files import part_of, read_json, replace_folder, settle, short, write_atomically
from ..utils.tensors import write_tensors
from . import hub, pretrained
from .compact import compact
from .manifest import MANIFEST, check_manifest, is_whole, write_manifest
from .masks import full_masks, masks_of, widths
from .skeleton import check_sizes, family_of, filled, kept, skeleton
from .verify import check_bytes, check_function, check_shapes, check_tensors, shapes_in

BUNDLED = Path(__file__).parents[1] / "bundled" / "digits_vit"
"""The snapshot of the small ViT that comes with the package."""

SPEC, WEIGHTS, METRICS = "spec.json", "weights.safetensors", "metrics.json"

FINISHERS: list[Callable[[nn.Module], None]] = []
"""What `load` does to a loaded model at last, for speed alone: outputs stay equal. Rooms above this one add to it when
they are imported, as `nvit.sparse24` does (the door `nvit.snapshot` imports it): nothing is imported upwards."""


def spec_of(model: nn.Module) -> ViTSpec:
    """The spec of a prepared model as it stands now, dense or compact; of a masked one, the dense model's.

    Raises:
        ValueError: it was changed in a way that a spec cannot say; names the place.

    >>> spec = nvit.snapshot.spec_of(nvit.load(nvit.BUNDLED))
    >>> spec.family, len(spec.blocks)
    ('timm_vit', 4)
    """
    adapter = adapters.find(model)
    groups = adapter.groups(model)
    places = {
        layer.axes[axis]: units for layer in prunable_layers(model).values() for axis, units in layer.places.items()
    }
    spec = adapter.spec(model, widths(groups, full_masks(groups)))
    spec = replace(spec, sparse=tuple(getattr(model, "sparse24", ())), kept=places)
    try:
        built = skeleton(spec)
    except ValueError as e:
        raise ValueError(f"what this {spec.architecture} says of itself builds no model: {short(e, 200)}") from None
    return replace(spec, changes=adapters.changes_of(model, built))


def save(path: str | Path, model: nn.Module, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write a model as a snapshot folder. The folder appears whole or not at all, and only where what is in it is the
    model: it is rebuilt from what is about to be written, has to compute the same (`verify.check_function`), and the
    written weights are read back. None of that needs a second copy of the weights.

    Args:
        path: the folder; an older snapshot there is replaced.
        model: a model of a supported family, dense or compact; a masked one is made compact first.
        metrics: plain values for `metrics.json`.

    Raises:
        OSError: the disk is full or the folder cannot be written.
        ValueError: `path` exists and is no snapshot, or the model is not what a snapshot of it would say.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> folder = nvit.snapshot.save("digits", model, {"top1": 97.5})
    >>> sorted(file.name for file in folder.iterdir())
    ['manifest.json', 'metrics.json', 'spec.json', 'weights.safetensors']
    """
    path = Path(path)
    settle(path, is_whole)
    if path.exists() and not (path.is_dir() and ((path / SPEC).exists() or not any(path.iterdir()))):
        raise ValueError(f"{path} exists and is not a snapshot; choose another folder")
    adapter = adapters.find(model)
    adapter.prepare(model)
    masks = masks_of(model)
    small = model if masks is None else compact(model, adapter.groups(model), masks)
    state = small.state_dict()
    check_tensors(state)
    spec = spec_of(small)
    check_function(model, spec, state)
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_tensors(part / WEIGHTS, {name: t.detach().cpu().contiguous() for name, t in state.items()})
        check_bytes(part / WEIGHTS, state)
        write_atomically(part / METRICS, (json.dumps(dict(metrics or {}), indent=2) + "\n").encode())
        write_atomically(part / SPEC, spec.to_json().encode())
        write_manifest(part)
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def is_snapshot(path: str | Path) -> bool:
    """Whether a folder holds a snapshot, or began as one.

    >>> nvit.snapshot.is_snapshot(nvit.BUNDLED), nvit.snapshot.is_snapshot("nowhere")
    (True, False)
    """
    settle(Path(path), is_whole)
    return (Path(path) / SPEC).exists()


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, sparse: bool = True
) -> nn.Module:
    """The compact model of a snapshot folder, in eval mode, ready for inference. Every file is checked against the
    manifest; a snapshot from before there were manifests loads with a warning. A folder that `nvit.hf.save_pretrained`
    wrote opens as well, as the class of transformers that was pruned; and `hf-hub:OWNER/NAME`, where either lies on the
    Hugging Face hub (`@REVISION` behind it for another than the last).

    Args:
        dtype: of the weights; as saved when None.
        sparse: on a GPU that can, run 2:4 projections on sparse tensor cores where that is measured faster; elsewhere
            they run as dense weights with zeros, with equal outputs. `model.sparse24_choices` says what was chosen.
            `FINISHERS` do it. Without it weights stay plain tensors, to train or to save again.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others; one line that names it.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    path = hub.fetch(path) if hub.is_hosted(path) else Path(path)
    settle(path, is_whole)
    if not (path / SPEC).exists() and pretrained.is_pruned(path):
        return pretrained.load(path, device, dtype)
    for name in (SPEC, WEIGHTS):
        if not (path / name).is_file():
            found = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else "no such folder"
            raise ValueError(f"{path} is not a snapshot: {name} is missing (found {short(found)})")
    if not check_manifest(path):
        warnings.warn(
            f"{path} has no {MANIFEST} (it is from before there were any): its files are unchecked; save it again",
            stacklevel=2,
        )
    spec = _read_spec(path / SPEC)
    try:
        model = skeleton(spec)
    except ModuleNotFoundError:
        raise
    except Exception as e:  # what unchecked numbers make of a host's constructor
        raise _unreadable(path / SPEC, e) from None
    check_shapes(path / WEIGHTS, shapes_in(path / WEIGHTS), model, SPEC)
    try:
        weights = load_file(path / WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path / WEIGHTS} is damaged: {short(e)}") from None
    _check_sparse(path, weights, spec.sparse)
    model = filled(model, weights)
    if dtype is not None:
        model.to(dtype)
    for finish in FINISHERS if sparse else ():
        finish(model)
    return model


def load_spec(path: str | Path) -> ViTSpec:
    """The spec of a snapshot folder.

    Raises:
        ValueError: it is missing or damaged.

    >>> nvit.snapshot.load_spec(nvit.BUNDLED).blocks[0]
    BlockWidths(emb=64, heads=4, qk_dim=16, v_dim=16, mlp=256)
    """
    path = Path(path)
    settle(path, is_whole)
    if not (path / SPEC).is_file():
        raise ValueError(f"{path} is not a snapshot: {SPEC} is missing")
    check_manifest(path, SPEC)
    return _read_spec(path / SPEC)


def load_metrics(path: str | Path) -> dict[str, Any]:
    """The plain values a snapshot was saved with; empty where there are none.

    Raises:
        ValueError: they are damaged.

    >>> list(nvit.snapshot.load_metrics(nvit.BUNDLED))
    ['top1']
    """
    path = Path(path)
    settle(path, is_whole)
    file = path / METRICS
    if not file.exists():
        return {}
    check_manifest(path, METRICS)
    try:
        found = read_json(file)
    except ValueError as e:
        raise ValueError(f"{file} is damaged: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(found).__name__}, expected an object")
    return found


def fresh(spec: ViTSpec) -> nn.Module:
    """A newly initialised model of these widths, to train from scratch.

    >>> model = nvit.snapshot.fresh(nvit.snapshot.load_spec(nvit.BUNDLED))
    >>> model(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """
    check_sizes(spec)
    family_of(spec)
    model = adapters.build(spec, "cpu")
    adapters.change_(model, spec.changes)
    family_of(spec).merge_(model, spec.merges)
    return compact(model, *kept(spec, model))


def _read_spec(file: Path) -> ViTSpec:
    try:
        return ViTSpec.from_json(file.read_text())
    except NewerFormat as e:
        raise ValueError(f"{file.parent} {e}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise _unreadable(file, e) from None


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or from another version: {short(error)}")


def _check_sparse(path: Path, weights: Mapping[str, Tensor], sparse: Sequence[str]) -> None:
    for name in sparse:
        w = weights.get(name)
        if w is None or w.dim() != 2 or w.shape[1] % 4 or int((w.unflatten(1, (-1, 4)) != 0).sum(-1).max()) > 2:
            raise ValueError(
                f"{path / WEIGHTS} does not fit {SPEC}: {short(name, 60)} is listed as 2:4 sparse but keeps more than "
                "two of four neighbours along its input; sparsify the dense snapshot again"
            )
