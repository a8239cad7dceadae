"""From the words and flags of a command to models, with a clear word where they do not fit together."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import nn

from .. import adapters
from ..adapters import hf_folder
from ..structure import snapshot
from ..training.distill import frozen, renormalisation
from .flags import DIGITS, ModelFlags


def open_model(name: str, flags: ModelFlags, device: torch.device, *, scratch: bool = False) -> nn.Module:
    """A prepared model on its device: a snapshot folder, a folder that transformers wrote, a timm name, or the bundled
    digits model.

    Raises:
        ValueError: unknown name, damaged snapshot or checkpoint, unsupported family.
    """
    if name == DIGITS:
        name = str(snapshot.BUNDLED)
    if snapshot.is_snapshot(name):
        # Plain weights on every device: what is opened here may be trained, pruned or saved.
        model = snapshot.fresh(snapshot.load_spec(name)) if scratch else snapshot.load(name, sparse=False)
        size = adapters.preprocess(model)["input_size"]
        if flags.img_size not in (0, size[-1]):
            raise ValueError(f"{name} takes images of {size[-2]} × {size[-1]}; leave out --img-size {flags.img_size}")
    elif Path(name).is_dir():
        model = _hf_model(name, flags, scratch)
    elif not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model {name!r} is neither a snapshot folder nor a timm model{hint}")
    else:
        model = _timm_model(name, flags, scratch)
    adapters.find(model).prepare(model)
    return model.to(device)


def _hf_model(folder: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    if not hf_folder.is_folder(folder):
        raise ValueError(
            f"{folder} is a folder but not a snapshot (no spec.json) nor a Hugging Face model (no config.json)"
        )
    for flag, value in (("--checkpoint", flags.checkpoint), ("--num-classes", flags.num_classes)):
        if value:
            raise ValueError(f"{flag} goes with a timm name; {folder} is a Hugging Face model with its own")
    return hf_folder.open_folder(folder, weights=flags.pretrained and not scratch)


def _timm_model(name: str, flags: ModelFlags, scratch: bool) -> nn.Module:
    asked = {key: value for key in ("num_classes", "img_size") if (value := getattr(flags, key))}
    pretrained = flags.pretrained and not flags.checkpoint and not scratch
    try:
        model = timm.create_model(name, pretrained=pretrained, **asked)
    except Exception as e:
        if not pretrained:
            raise
        raise ValueError(f"{name}: pretrained weights cannot be had ({e}); give --checkpoint or --no-pretrained") from e
    if flags.checkpoint and not scratch:
        if not Path(flags.checkpoint).is_file():
            raise ValueError(f"checkpoint {flags.checkpoint} does not exist")
        # timm's own filter brings position embeddings to another image size.
        resampled = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        filter_fn = resampled if flags.img_size else None
        try:
            load_checkpoint(model, flags.checkpoint, use_ema=False, weights_only=True, filter_fn=filter_fn)
        except (RuntimeError, KeyError, OSError, SafetensorError, EOFError, ValueError) as e:
            first = str(e).strip().splitlines()[0]
            raise ValueError(f"checkpoint {flags.checkpoint} does not fit {name}: {first}") from None
    return model


def untrained(name: str, flags: ModelFlags, *, scratch: bool = False) -> bool:
    """Whether a model's weights are new, so that there is nothing to ask it."""
    kept = flags.pretrained or flags.checkpoint or name == DIGITS or snapshot.is_snapshot(name)
    return scratch or not kept


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
