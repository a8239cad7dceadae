"""Image classifiers of Hugging Face transformers: ViT, DeiT with one classifier or two, DINOv2 and its registers.

transformers is imported where a model of it is made, never to look at another one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Attention, GatedMlp, LayerScale, Layout, Linear, Mlp, Prunable, StreamEntry
from ..spec import BUNDLE_SIZES, BlockWidths, Group, Part, ViTSpec
from . import plain
from .base import Logits
from .declare import Width, block_axes, block_widths, collect, embedding_slices, norm, resize_layers, with_axes

OLDEST = (5, 18)
"""The first transformers whose four families name their projections alike."""

EMB = {"emb": "emb"}
HALF, IMAGENET_MEAN, IMAGENET_STD = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 224 / 256}


@dataclass(frozen=True)
class Host:
    """What an architecture calls its pieces, and how its checkpoints' images are prepared where nothing else is said.

    Attributes:
        layers: of the base model.
        norms, scales: of a block, before and after its attention and MLP; no scales where there is no LayerScale.
        classifiers: of the class token and of the distillation token.
        reads: vectors of the stream that a classifier reads side by side: the class token, the mean of the patches.
        any_size: it interpolates its positions for images of any size.
        images: as timm's data config names it.
    """

    layers: str
    norms: tuple[str, str]
    images: Mapping[str, Any]
    scales: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ("classifier",)
    reads: int = 1
    any_size: bool = False


_VIT = Host(
    "layers",
    ("layernorm_before", "layernorm_after"),
    {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
)
_DEIT = replace(_VIT, images=IMAGENET | {"crop_mode": "squash"})
_DINO = Host(
    "encoder.layer",
    ("norm1", "norm2"),
    IMAGENET | {"crop_mode": "center"},
    scales=("layer_scale1", "layer_scale2"),
    reads=2,
    any_size=True,
)
ARCHITECTURES: dict[str, Host] = {
    "ViTForImageClassification": _VIT,
    "DeiTForImageClassification": _DEIT,
    "DeiTForImageClassificationWithTeacher": replace(_DEIT, classifiers=("cls_classifier", "distillation_classifier")),
    "Dinov2ForImageClassification": _DINO,
    "Dinov2WithRegistersForImageClassification": _DINO,
}


class _Attention(Attention):
    """Called as transformers' blocks call theirs: the second output is for attention weights, which nobody computes."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **_: Any
    ) -> tuple[Tensor, None]:
        if output_attentions:
            raise ValueError("a prunable model computes no attention weights; leave out output_attentions")
        return self.attend(hidden_states, attention_mask), None


def _version(transformers: ModuleType) -> str | None:
    """Why this version of transformers will not do, or None."""
    found = transformers.__version__
    if tuple(int(n) for n in found.split(".")[:2]) < OLDEST:
        return f"transformers {found} is too old; pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
    return None


def library() -> ModuleType:
    """transformers itself, imported now; errors as in `build`."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Hugging Face models need transformers: pip install 'nvit[hf]'") from None
    if reason := _version(transformers):
        raise ValueError(reason)
    return transformers


def _host(model: nn.Module) -> Host:
    return ARCHITECTURES[type(model).__name__]


def _layers(model: nn.Module) -> nn.ModuleList:
    return model.base_model.get_submodule(_host(model).layers)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _is_plain(m: nn.Module) -> bool:
    """Whether a module has no parameters of its own, or is one that blocks have when nobody has changed them."""
    own = next(m.parameters(recurse=False), None) is not None
    return not own or type(m) in (nn.Linear, nn.LayerNorm) or type(m).__name__.endswith("LayerScale")


def knows(model: nn.Module) -> bool:
    """Whether the model is one of transformers' own; a subclass may compute anything."""
    return type(model).__module__.startswith("transformers.models.")


def refusal(model: nn.Module) -> str | None:
    """Why a model of transformers is not one that this adapter takes, or None."""
    if type(model).__name__ not in ARCHITECTURES:
        return f"of transformers' classes it has to be one of {', '.join(ARCHITECTURES)}"
    if hasattr(model, "dense_config"):
        return None
    if reason := _version(sys.modules["transformers"]):
        return reason
    if not all(isinstance(getattr(model, c), nn.Linear) for c in _host(model).classifiers):
        return "no linear classifier"
    layers = _layers(model)
    if len(layers) == 0:
        return "no blocks"
    changed = next((type(m).__name__ for m in layers.modules() if not _is_plain(m)), None)
    return None if changed is None else f"a {changed} in its blocks"


def prepare(model: nn.Module) -> nn.Module:
    """Swap transformers' layers for prunable ones, in place. Outputs, parameters and their names stay as they are.

    Raises:
        ValueError: a model this adapter does not know, or one that its own config does not describe.
    """
    if reason := refusal(model):
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")
    if hasattr(model, "dense_config"):
        return model
    config = _config(model)
    described = dense(type(model).__name__, config, "meta").state_dict()
    mine = model.state_dict()
    for name in (*described, *mine):
        theirs, found = (tuple(d[name].shape) if name in d else None for d in (described, mine))
        if theirs != found:
            raise ValueError(
                f"{name} is {found} but a {type(model).__name__} of its config has {theirs} there; set model.config "
                "to what the model is (num_labels for a new classifier), as a snapshot is rebuilt from it"
            )
    return _swap(model, config, preprocess(model))


def _swap(model: nn.Module, config: Mapping[str, Any], images: Mapping[str, Any]) -> nn.Module:
    host, base = _host(model), model.base_model
    model.dense_config, model.preprocess = dict(config), dict(images)
    model.set_attn_implementation("sdpa")  # the masks that prunable attention takes
    dropout = base.embeddings.dropout
    base.embeddings.dropout = nn.Sequential(dropout, with_axes(EMB, StreamEntry(), dropout))
    for i, layer in enumerate(_layers(model)):
        attention_axes, mlp_axes = block_axes(f"blocks.{i}")
        for name in host.norms:
            setattr(layer, name, norm(getattr(layer, name), EMB))
        for name in host.scales:
            scale = getattr(layer, name)
            setattr(layer, name, with_axes(EMB, LayerScale(scale.lambda1, "lambda1"), scale))
        layer.attention = _attention(layer.attention, attention_axes)
        layer.mlp = _mlp(layer.mlp, mlp_axes)
    base.layernorm = norm(base.layernorm, EMB)
    inputs = Layout((None, "emb"), (host.reads, base.layernorm.weight.numel()))
    for name in host.classifiers:
        classifier = getattr(model, name)
        setattr(model, name, with_axes(EMB, Linear(classifier, inputs=inputs), classifier))
    return model


def _attention(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    layer = _Attention(
        host,
        heads=host.num_attention_heads,
        qk_dim=host.head_dim,
        v_dim=host.head_dim,
        scale=host.scaling,
        inputs=("q_proj", "k_proj", "v_proj"),
        proj="o_proj",
        attn_drop=host.attention_dropout,
    )
    return with_axes(axes, layer, host)


def _mlp(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    if hasattr(host, "gate_proj"):
        layer = GatedMlp(host, host.act_fn, first=("gate_proj", "up_proj"), last="down_proj")
    else:
        act = host.activation_fn
        # transformers wraps the function in a module of its own, which fused kernels do not know.
        layer = Mlp(host, nn.GELU() if getattr(act, "act", None) is F.gelu else act)
    return with_axes(axes, layer, host)


def groups(model: nn.Module, bundle_sizes: Mapping[str, int] = BUNDLE_SIZES) -> list[Group]:
    """The prunable widths of a prepared model: one residual stream, then heads, qk_dim, v_dim, mlp block by block."""
    depth = len(_layers(model))
    widths = [Width("emb", "emb", tuple(range(depth)))]
    for i in range(depth):
        widths += block_widths(f"blocks.{i}", i)
    prefix, embeddings = f"{model.base_model_prefix}.embeddings.", model.base_model.embeddings
    patches = {f"{prefix}patch_embeddings.projection.{leaf}": 0 for leaf in ("weight", "bias")}
    tokens = {f"{prefix}{name}": p.dim() - 1 for name, p in embeddings.named_parameters(recurse=False)}
    return collect(model, widths, {"emb": embedding_slices(model, tokens | patches, patches)}, bundle_sizes)


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's config as its JSON file holds it, without what follows from the rest."""
    saved = json.loads(model.config.to_json_string())
    derived = ("architectures", "dtype", "out_features", "out_indices", "stage_names", "transformers_version")
    return {key: value for key, value in saved.items() if key not in derived}


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How images are prepared for `model`, prepared or not, as timm's data config names it.

    A model of transformers does not know. What `model.preprocess` (a dict) says goes first, then what the image
    processors of its architecture's checkpoints do; the size is the config's own, except that DINOv2 takes any.
    """
    host, config = _host(model), model.config
    own = {"input_size": (config.num_channels, *_pair(config.image_size))}
    found = own | dict(host.images) | dict(getattr(model, "preprocess", {}))
    if not host.any_size:
        found |= own
    if len(found["mean"]) != config.num_channels:
        found |= {"mean": (0.5,) * config.num_channels, "std": (0.5,) * config.num_channels}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def spec(model: nn.Module, blocks: Sequence[BlockWidths]) -> ViTSpec:
    """The spec of a prepared model at these widths."""
    images = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess(model).items()}
    architecture = type(model).__name__
    name = model.config.name_or_path or architecture
    return ViTSpec("hf_vit", architecture, model.dense_config, tuple(blocks), images, name)


def dense(architecture: str, config: Mapping[str, Any], device: str) -> nn.Module:
    """An unprepared model of a config, freshly initialised where `device` has memory."""
    cls = getattr(library(), architecture)
    try:
        with torch.device(device):
            return cls(cls.config_class.from_dict(dict(config)))
    except Exception as e:  # its validation has exception classes of its own
        raise ValueError(f"its config does not build a {architecture}: {' '.join(str(e).split())}") from None


def build(spec: ViTSpec, device: str = "meta") -> nn.Module:
    """The prepared dense model of `spec`: on the meta device its structure alone, elsewhere freshly initialised.

    Raises:
        ValueError: an architecture or config this version does not know, or a transformers that is too old.
        ModuleNotFoundError: transformers is not installed.
    """
    if spec.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {spec.architecture!r} is unknown; expected one of {', '.join(ARCHITECTURES)}")
    model = dense(spec.architecture, spec.config, device)
    model.config.name_or_path = spec.name
    return _swap(model, spec.config, {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()})


def resize(model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """Give a prepared model these parameters and the widths that `masks` leaves, in place. Its config stays the dense
    one: it has no word for a block's own widths."""
    resize_layers(model, params, masks)
    model.base_model.embeddings.patch_embeddings.projection.out_channels = int(masks["emb"].sum())
    return model


def logits(model: nn.Module, images: Tensor) -> Logits:
    """`(batch, classes)` from the class token and, of a DeiT with teacher, from the distillation token."""
    out = model(images, return_dict=True)
    if len(_host(model).classifiers) == 1:
        return Logits(out.logits)
    return Logits(out.cls_logits, out.distillation_logits)


def tokens(model: nn.Module) -> int:
    """Tokens in the residual stream at the model's own input size."""
    embeddings, config = model.base_model.embeddings, model.config
    prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
    prefix += getattr(config, "num_register_tokens", 0)
    return prefix + _patches(model)


def _patches(model: nn.Module) -> int:
    (_, height, width), (down, across) = preprocess(model)["input_size"], _pair(model.config.patch_size)
    return (height // down) * (width // across)


def parts(model: nn.Module) -> tuple[Part, ...]:
    """The attention and the MLP of every block, each with its norm and residual, and the rest of the model."""
    return plain.parts(len(_layers(model)))


def part_macs(model: nn.Module, part: Part) -> Callable[..., int]:
    """Multiply-accumulates an image of one piece of `part`, as a function of its widths."""
    if part.name == "attention":
        return plain.attention_macs(tokens(model))
    if part.name == "mlp":
        return plain.mlp_macs(tokens(model), 3 if isinstance(_layers(model)[0].mlp, GatedMlp) else 2)
    host, conv = _host(model), model.base_model.embeddings.patch_embeddings.projection.weight[0].numel()
    outputs = len(host.classifiers) * host.reads * model.num_labels
    return lambda emb: (conv * _patches(model) + outputs) * emb


def sample_spec(spec: ViTSpec, part: Part, widths: Sequence[int]) -> ViTSpec:
    """One block that has `widths` along the axes of `part`, and elsewhere the widest of the model."""
    return plain.sample_spec(spec, part, widths, num_hidden_layers=1)


def piece(model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """`attention` or `mlp` of the first block with its norm and residual, stream to stream; or the `rest`, images to
    logits with no block in between, for which `model` loses its blocks."""
    host, layers = _host(model), _layers(model)
    if part.name == "rest":
        del layers[:]
        return model, preprocess(model)["input_size"]
    block, second = layers[0], part.name == "mlp"
    before = getattr(block, host.norms[second])
    scale = getattr(block, host.scales[second]) if host.scales else nn.Identity()
    stream = (tokens(model), model.base_model.layernorm.weight.numel())
    if second:
        return lambda x: x + scale(block.mlp(before(x))), stream
    return lambda x: x + scale(block.attention(before(x))[0]), stream
