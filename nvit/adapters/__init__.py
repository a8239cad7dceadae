"""Model families: which weights of a model leave together, declared rather than traced.

To add a family, write a subclass of `base.Adapter` in a file of its own and list it in `FAMILIES`. A model that is an
embedding, a stack of blocks and what follows them is a `one_stream.OneStream`, which knows its groups and the parts of
its latency already; a plain transformer of timm is a `timm_plain.TimmPlain`. The layers declare their own slices
(`declare`); an adapter swaps them in, names the widths and rebuilds the host from a spec. Tiny hosts in
`tests/families` hold it to all that a family promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..layers.bypass import carried
from ..spec import ViTSpec
from .base import Adapter, Logits
from .changes import change_, changes_of
from .hf_hosts import is_tower
from .hf_vit import HFViT
from .masking import hook_refusal
from .restore import restore_
from .segmenter import Segmenters
from .segmenter import segmenter as _segmenter
from .timm_beit import TimmBeit
from .timm_eva import TimmEva
from .timm_swin import TimmSwin
from .timm_vit import TimmViT
from .tower import CHOICES, KEEP_OUTPUT, choose_features_
from .wrapped import tied, way_in

__all__ = [
    "CHOICES",
    "FAMILIES",
    "SUPPORTED",
    "Adapter",
    "Logits",
    "build",
    "change_",
    "changes_of",
    "choose_features_",
    "classes",
    "find",
    "keep_output_",
    "label_names",
    "merge_",
    "merges",
    "of",
    "predict",
    "preprocess",
    "refusal",
    "segmenter",
]

FAMILIES: dict[str, Adapter] = {a.family: a for a in (TimmViT(), TimmSwin(), TimmEva(), TimmBeit(), HFViT())}
FAMILIES |= {Segmenters.family: Segmenters(dict(FAMILIES))}

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP), SwinTransformer, Eva (EVA02, DINOv3, PE) and Beit; "
    "Hugging Face's ViT, DeiT and DINOv2 classifiers, and towers of ViT, DINOv2, DINOv3, CLIP and SigLIP; "
    "docs/models.md lists them."
)

UNKNOWN = "no adapter knows its class"


def refusal(model: nn.Module) -> str | None:
    """Why no adapter takes `model`, or None.

    >>> nvit.adapters.refusal(nvit.load(nvit.BUNDLED))
    >>> nvit.adapters.refusal(torch.nn.Linear(2, 2))
    'no adapter knows its class'
    """
    family = _family(model)
    if family is None:
        hosts = tuple(cls for a in FAMILIES.values() for cls in a.hosts())
        return way_in(model, lambda m: _family(m) is not None, hosts) or UNKNOWN
    return tied(model) or family.refusal(model)


def _family(model: nn.Module) -> Adapter | None:
    return next((a for a in FAMILIES.values() if a.knows(model)), None)


def find(model: nn.Module) -> Adapter:
    """The adapter for `model`.

    Raises:
        ValueError: no adapter takes it; names the reason and the supported families.

    >>> nvit.adapters.find(nvit.load(nvit.BUNDLED)).family
    'timm_vit'
    """
    if (reason := refusal(model)) is not None:
        elsewhere = _family(model) is None and reason != UNKNOWN  # there is a way in
        known = "" if elsewhere else f". Supported families: {SUPPORTED}"
        raise ValueError(f"{type(model).__module__}.{type(model).__name__} is not supported: {reason}{known}")
    return of(model)


def of(model: nn.Module) -> Adapter:
    """The adapter of a prepared model, which `find` took before; its blocks may be wrapped meanwhile (in shards).

    >>> nvit.adapters.of(nvit.load(nvit.BUNDLED)).family
    'timm_vit'
    """
    return next(a for a in FAMILIES.values() if a.knows(model))


def find_maskable(model: nn.Module) -> Adapter:
    """The adapter for a model that is going to be masked.

    Raises:
        ValueError: as `find`; or masks would bypass something in it, an adapter, a hook, a parametrised or quantised
            weight, which is named. The model is left as it was.

    >>> model = nvit.load(nvit.BUNDLED)
    >>> nvit.adapters.find_maskable(model).family
    'timm_vit'
    >>> hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: None)
    >>> nvit.adapters.find_maskable(model)
    Traceback (most recent call last):
    ValueError: ...
    """
    host = next((m for m in model.modules() if any(a.knows(m) for a in FAMILIES.values())), None)
    if (reason := None if host is None else carried(host)) is None:
        family = find(model)
        reason = hook_refusal(model, family.prepare)
    if reason is not None:
        raise ValueError(reason)
    return family


def build(spec: ViTSpec, device: str = "meta") -> nn.Module:
    """The prepared dense model of a spec, see `Adapter.build`; its family has to be known.

    >>> len(nvit.adapters.build(nvit.snapshot.load_spec(nvit.BUNDLED)).blocks)
    4
    """
    config, family = dict(spec.config), FAMILIES[spec.family]
    width = config.pop(KEEP_OUTPUT, None)
    model = family.build(replace(spec, config=config), device)
    return model if width is None else restore_(family, model, width)


def keep_output_(model: nn.Module, features: str = "auto") -> nn.Module:
    """Let the output of a prepared tower keep its width whatever is pruned, in place; see `restore.restore_`.

    Args:
        features: what of it, one of `CHOICES`.

    Raises:
        ValueError: it is no tower, has no place for that, or its tokens leave elsewhere.

    >>> nvit.adapters.keep_output_(nvit.load(nvit.BUNDLED))
    Traceback (most recent call last):
    ValueError: ...
    """
    if classes(model) != 0:
        raise ValueError("keep_output is for towers without a classifier; a classifier keeps its outputs by itself")
    adapter = find(model)
    if features != "auto" and adapter.output_norm(model) in ("", "fc_norm"):
        raise ValueError(
            f"keep_output: a {type(model).__name__} keeps the width of its own output, not of its tokens; take "
            f"features auto in place of {features}, or prune without keep_output, which leaves the stream whole"
        )
    return restore_(adapter, model)


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for a model of a supported family: timm's data config, at the model's own size.

    >>> nvit.adapters.preprocess(nvit.load(nvit.BUNDLED))["input_size"]
    (1, 8, 8)
    """
    return find(model).preprocess(model)


def label_names(model: nn.Module) -> dict[str, int]:
    """Class numbers by the model's own names of its classes; empty where it has none, or no adapter knows it.

    >>> nvit.adapters.label_names(nvit.load(nvit.BUNDLED))
    {}
    """
    return find(model).label_names(model) if refusal(model) is None else {}


def merge_(model: nn.Module, merges: Sequence[int]) -> nn.Module:
    """Let so many tokens of a model merge in each of its blocks, in place (it is prepared first), between attention and
    MLP; see docs/tokens.md. Nothing, or 0 everywhere, ends it. Returns the model.

    Raises:
        ValueError: the model's family cannot, or there are not as many tokens.

    >>> model = nvit.adapters.merge_(nvit.load(nvit.BUNDLED), (2, 2, 2, 2))
    >>> nvit.adapters.merges(model), model(torch.zeros(2, 1, 8, 8)).shape
    ((2, 2, 2, 2), torch.Size([2, 10]))
    """
    adapter = find(model)
    adapter.prepare(model)
    adapter.merge_(model, merges)
    return model


def merges(model: nn.Module) -> tuple[int, ...]:
    """How many tokens merge in each block of a model; empty where none do.

    >>> nvit.adapters.merges(nvit.load(nvit.BUNDLED))
    ()
    """
    return find(model).merges(model)


def segmenter(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A model of a supported family, dense or pruned, with SETR's naive head for pixels in place of its classifier.

    Args:
        model: it becomes a part of the result.
        names: of the classes, in the order of their numbers.

    Raises:
        ValueError: an unsupported model, or one whose tokens make no map.

    >>> model = nvit.adapters.segmenter(nvit.load(nvit.BUNDLED), ["ink", "paper"])
    >>> model(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 2, 8, 8])
    """
    family = find(model)
    return _segmenter(family.prepare(model), family, names)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(batch, classes)` of any classifier, also one that hands them out in an object, as transformers' do; of a
    prepared tower without one its features.

    >>> nvit.adapters.predict(nvit.load(nvit.BUNDLED), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if hasattr(model, "dense_config") and not classes(model):
        return of(model).logits(model, images).mean
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def classes(model: nn.Module) -> int | None:
    """How many outputs a model has (classes that it tells apart), under timm's name for it or transformers'; None where
    it does not say.

    >>> nvit.adapters.classes(nvit.load(nvit.BUNDLED))
    10
    """
    if hasattr(model, "dense_config") and isinstance(head := getattr(model, "head", None), nn.Linear):
        return head.out_features  # a new head does not tell the model
    return 0 if is_tower(model) else getattr(model, "num_classes", getattr(model, "num_labels", None))
