"""From the words and flags of a command to models, with a clear word where they do not fit together."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from .. import adapters, parallel, zoo  # noqa: F401  (zoo: its models get names in timm)
from ..adapters import hf_folder
from ..prune.folder import RunFolder
from ..structure import hub, snapshot
from ..training.distill import frozen, renormalisation
from ..utils.files import short
from .checkpoint import load_weights_
from .flags import DIGITS, ModelFlags

HOSTED = ("hf-hub:", "hf_hub:", "local-dir:")
"""What stands before names of timm models that are not timm's own: on the Hugging Face hub, or in a folder."""


def open_model(name: str, flags: ModelFlags, device: torch.device, *, scratch: bool = False) -> nn.Module:
    """A prepared model on its device: a snapshot's folder, a run's (see `snapshot_of`), one that transformers wrote, a
    timm name (also `hf-hub:NAME`, `local-dir:FOLDER`), or the bundled digits model.

    Raises:
        ValueError: unknown name, damaged snapshot or checkpoint, unsupported family.
    """
    name = snapshot_of(name, flags.target)
    if snapshot.is_snapshot(name):
        own = f"{name} is a snapshot, which has its own"
        _refuse(flags, own, "checkpoint")
        # Plain weights on every device: what is opened here may be trained, pruned or saved.
        model = snapshot.fresh(snapshot.load_spec(name)) if scratch else _load(name)
        if flags.num_classes != adapters.classes(model):
            _refuse(flags, f"{own}, {adapters.classes(model)}", "num_classes")
        if flags.size not in (None, adapters.preprocess(model)["input_size"][-2:]):
            adapters.of(model).set_image_size_(model, flags.size)
    elif Path(name).is_dir():
        model = _hf_model(name, flags, scratch)
    elif not name.startswith(HOSTED) and not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model {name!r} is neither a snapshot folder nor a timm model{hint}")
    else:
        model = _timm_model(name, flags, scratch)
    adapters.find(model).prepare(model)
    return model.to(device)


def open_models(names: Sequence[str], flags: ModelFlags, device: torch.device) -> list[nn.Module]:
    """Several models, as `open_model`: what goes with timm names alone (`checkpoint`, `num_classes`) or with runs alone
    (`target`) is for those among them, and is refused where there are none."""
    runs = {name for name in names if RunFolder(name).snapshots()}
    others = {name for name in names if name in runs or is_snapshot(name) or Path(name).is_dir()}
    models = []
    for name in names:
        mine = flags
        if name in others and len(others) < len(set(names)):
            mine = replace(mine, checkpoint="", num_classes=0)
        if name not in runs and runs:
            mine = replace(mine, target=0.0)
        models.append(open_model(name, mine, device))
    return models


def snapshot_of(name: str, target: float = 0.0) -> str:
    """The snapshot's folder that a name means: of a run's folder its smallest target or the one asked for, of `digits`
    the bundled one, of `hf-hub:NAME` the one that lies there; any other name as it is.

    Raises:
        ValueError: the run has no snapshot at that target, or none at all; or a target of what is no run.
    """
    if name == DIGITS:
        name = str(snapshot.BUNDLED)
    if hub.is_hosted(name) and (fetched := hub.snapshot_at(name)) is not None:
        name = fetched
    found = {} if snapshot.is_snapshot(name) else RunFolder(name).snapshots()
    if not found:
        if target:
            raise ValueError(f"--target {target:g} is of a run's folder, which {name} is not; leave it out")
        return name
    if target and target not in found:
        raise ValueError(f"{name} has no snapshot at {target:g}; it has {', '.join(f'{t:g}' for t in found)}")
    return str(found[target or min(found)])


def snapshots_of(names: Sequence[str], target: float = 0.0) -> list[str]:
    """The snapshots' folders that names mean, as `snapshot_of`; of a run's folder every one, largest first, where no
    target is asked for.

    Raises:
        ValueError: as `snapshot_of`; or a name is neither a snapshot nor a run.
    """
    found = []
    for name in names:
        whole = {} if target else RunFolder(name).snapshots()
        folders = [str(whole[t]) for t in sorted(whole, reverse=True)] or [snapshot_of(name, target)]
        if not snapshot.is_snapshot(folders[0]):
            raise ValueError(
                f"{name} is neither a snapshot (spec.json is missing) nor a run (nor any target-*/ with one); give the "
                "folder of a pruned model"
            )
        found += folders
    return list(dict.fromkeys(found))


def is_snapshot(name: str) -> bool:
    """Whether a name means a snapshot, by itself or as a run's."""
    return snapshot.is_snapshot(snapshot_of(name))


def _load(folder: str) -> nn.Module:
    """A snapshot, with what it warns of as a line of the command's own."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = snapshot.load(folder, sparse=False)
    for warning in said if parallel.main() else ():
        print(f"nvit: {warning.message}", file=sys.stderr)
    return model


def _hf_model(folder: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    if not hf_folder.is_folder(folder):
        raise ValueError(
            f"{folder} is a folder but not a snapshot (no spec.json) nor a Hugging Face model (no config.json)"
        )
    _refuse(flags, f"{folder} is a Hugging Face model with its own", "checkpoint", "num_classes", "img_size")
    if (spec := hf_folder.pruned_spec(folder)) is not None:
        return snapshot.fresh(spec) if scratch or not flags.pretrained else _load(folder)
    return hf_folder.open_folder(folder, weights=flags.pretrained and not scratch)


def _refuse(flags: ModelFlags, because: str, *names: str) -> None:
    """Raise ValueError where a flag is given that would change nothing."""
    default = ModelFlags()
    for name in names:
        if (value := getattr(flags, name)) != getattr(default, name):
            flag = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{flag} goes with a timm name; {because}; leave it out")


def _timm_model(name: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    if flags.num_classes < 0:
        raise ValueError(f"--num-classes {flags.num_classes} is negative")
    if scratch:
        _refuse(flags, "--scratch starts from random weights", "checkpoint")
    if flags.checkpoint and not Path(flags.checkpoint).is_file():
        raise ValueError(f"checkpoint {flags.checkpoint} does not exist")
    asked = {key: value for key, value in (("num_classes", flags.num_classes), ("img_size", flags.size)) if value}
    pretrained = flags.pretrained and not flags.checkpoint and not scratch
    try:
        model = timm.create_model(name, pretrained=pretrained, **asked)
    except Exception as e:
        if not pretrained:
            said = f" with {asked}" if asked else ""
            raise ValueError(f"{name} cannot be made{said}: {short(e)}") from e
        if hub.is_hosted(name):
            raise ValueError(f"{name} holds no snapshot, nor a timm model that can be had: {short(e, 300)}") from e
        why = f"{name}: pretrained weights cannot be had ({short(e, 300)}); give --checkpoint or --no-pretrained"
        raise ValueError(why) from e
    _check_size(name, model, flags.size)
    if flags.checkpoint:
        # timm's own filter brings position embeddings to another image size.
        resampled = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        load_weights_(model, flags.checkpoint, name, resampled if flags.size else None)
    return model


def untrained(name: str, flags: ModelFlags, *, scratch: bool = False) -> bool:
    """Whether a model's weights are new, so that there is nothing to ask it."""
    kept = flags.pretrained or flags.checkpoint or is_snapshot(name)
    return scratch or not kept


def _check_size(name: str, model: nn.Module, size: tuple[int, int] | None) -> None:
    """Raise ValueError where patches do not fill images of this height and width, None if none was asked for."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    for side in size if size and patch else ():
        if side % max(patch):
            below = side - side % max(patch)
            near = f"{below} or {below + max(patch)}" if below else f"{max(patch)}"
            raise ValueError(f"--img-size {side}: {name} has patches of {max(patch)} pixels a side; take {near}")


def open_teacher(name: str, checkpoint: str, device: torch.device) -> nn.Module | None:
    """The frozen model for L_full, named as MODEL is; None where none is named."""
    return frozen(open_model(name, ModelFlags(checkpoint=checkpoint), device)) if name else None


def open_cnn_teacher(name: str, model: nn.Module):
    """A timm model for hard labels, and the change of image normalisation from `model` to it; None for both where
    none is named.

    Raises:
        ValueError: it cannot be had, or has other classes.
    """
    if not name:
        return None, None
    device = next(model.parameters()).device
    try:
        teacher = timm.create_model(name, pretrained=True).to(device)
    except Exception as e:
        raise ValueError(f"CNN teacher {name!r} cannot be had: {e}") from None
    theirs, mine = teacher.num_classes, adapters.classes(model)
    if theirs != mine:
        raise ValueError(f"CNN teacher {name!r} has {theirs} classes, the model {mine}")
    images = adapters.preprocess(model), resolve_data_config(model=teacher)
    return frozen(teacher), renormalisation(*images, device)
