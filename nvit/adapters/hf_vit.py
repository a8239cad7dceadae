"""Image models of Hugging Face transformers: classifiers (ViT, DeiT with one classifier or two, DINOv2 and its
registers) and towers without one (these, DINOv3, CLIP, SigLIP)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GatedMlp, LayerScale, Layout, Linear, Mlp, Prunable
from ..spec import Part, Slice, ViTSpec
from .base import Logits, host_class
from .declare import EMB, block_axes, embedding_slices, norm, resize_layers, with_axes
from .ended import end_
from .hf_config import dense_config
from .hf_hosts import ARCHITECTURES, POOLER, REFUSED, base_of, dense, host_of, in_base, pair, too_old
from .hf_parts import ProbePool, TransformersAttention, enter_stream_, probe_macs
from .one_stream import OneStream
from .tower import picked, restored_width

PROBLEMS = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
"""Names of tasks by those of transformers' `problem_type`."""


class HFViT(OneStream):
    """The adapter of transformers' ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP."""

    family = "hf_vit"
    depth_key = "num_hidden_layers"

    def merge_refusal(self, model: nn.Module) -> str | None:
        return "transformers runs its layers one by one; take the same model from timm"

    def knows(self, model: nn.Module) -> bool:
        return host_class(model).__module__.startswith("transformers.models.")

    def refusal(self, model: nn.Module) -> str | None:
        if (name := host_class(model).__name__) in REFUSED:
            return REFUSED[name]
        if name not in ARCHITECTURES:
            return f"of transformers' classes it has to be one of {', '.join(ARCHITECTURES)}"
        if hasattr(model, "dense_config"):
            return None
        if reason := too_old(sys.modules["transformers"]):
            return reason
        if not all(isinstance(getattr(model, c), nn.Linear) for c in host_of(model).classifiers):
            return "no linear classifier"
        layers = self.stack(model)
        if len(layers) == 0:
            return "no blocks"
        changed = next((type(m).__name__ for m in layers.modules() if not _is_plain(m)), None)
        return None if changed is None else f"a {changed} in its blocks"

    def prepare(self, model: nn.Module) -> nn.Module:
        """As every adapter's.

        Raises:
            ValueError: a model this adapter does not know, or one that its own config does not describe.
        """
        if reason := self.refusal(model):
            raise ValueError(f"{type(model).__name__} is not supported: {reason}")
        if hasattr(model, "dense_config"):
            return _prepare_heads(model)
        config = _config(model)
        described = dense(host_class(model).__name__, config, "meta").state_dict()
        mine = model.state_dict()
        for name in (*described, *mine):
            theirs, found = (tuple(d[name].shape) if name in d else None for d in (described, mine))
            if theirs != found:
                raise ValueError(
                    f"{name} is {found} but a {type(model).__name__} of its config has {theirs} there; set "
                    "model.config to what the model is (num_labels for a new classifier), as a snapshot is rebuilt "
                    "from it"
                )
        return self._swap(model, self.preprocess(model))

    def _swap(self, model: nn.Module, images: Mapping[str, Any]) -> nn.Module:
        host, base = host_of(model), base_of(model)
        model.dense_config, model.preprocess = {}, dict(images)  # its config says the rest, see `settings`
        model.set_attn_implementation("sdpa")  # the masks that prunable attention takes
        enter_stream_(base, host.entry)
        for i, layer in enumerate(self.stack(model)):
            attention_axes, mlp_axes = block_axes(f"blocks.{i}")
            for name in host.norms:
                setattr(layer, name, norm(getattr(layer, name), EMB))
            for name in host.scales:
                scale = getattr(layer, name)
                setattr(layer, name, with_axes(EMB, LayerScale(scale.lambda1, "lambda1"), scale))
            setattr(layer, host.attention, _attention(getattr(layer, host.attention), attention_axes, host.proj))
            layer.mlp = _mlp(layer.mlp, mlp_axes)
        setattr(base, host.norm, norm(getattr(base, host.norm), EMB))
        if host.pool and getattr(base, "use_head", True):
            setattr(base, host.pool, with_axes(EMB, ProbePool(getattr(base, host.pool)), getattr(base, host.pool)))
        return _prepare_heads(model)

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """The model's config as it is now. Its widths stay the dense model's: it has no word for a block's own."""
        return _config(model)

    def extent(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        image, patch = (pair(config.get(key, 1)) for key in ("image_size", "patch_size"))
        tokens = (image[0] // max(1, patch[0])) * (image[1] // max(1, patch[1]))
        return config.get("num_hidden_layers", 0), tokens, config.get("hidden_size", 0)

    def stack(self, model: nn.Module) -> nn.ModuleList:
        return base_of(model).get_submodule(host_of(model).layers)

    def norms(self, model: nn.Module) -> Mapping[str, str]:
        host = host_of(model)
        return dict(zip((host.attention, "mlp"), host.norms, strict=True))

    def emb(self, model: nn.Module) -> int:
        return _last_norm(model).weight.numel()

    def embeddings(self, model: nn.Module) -> list[Slice]:
        """The patches' kernels have the stream's channels first, class tokens, positions and alike have them last."""
        found = {in_base(model, f"embeddings.{name}"): p for name, p in base_of(model).embeddings.named_parameters()}
        patches = {f"{in_base(model, host_of(model).patches)}.{leaf}": 0 for leaf in ("weight", "bias")}
        return embedding_slices(model, {name: p.dim() - 1 for name, p in found.items()} | patches, patches)

    def name(self, model: nn.Module) -> str:
        return model.config.name_or_path or type(model).__name__

    def build(self, spec: ViTSpec, device: str = "meta") -> nn.Module:
        """As every adapter's.

        Raises:
            ValueError: an architecture or config this version does not know, or a transformers that is too old.
            ModuleNotFoundError: transformers is not installed.
        """
        if spec.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architecture {spec.architecture!r} is unknown; expected one of {known}")
        model = dense(spec.architecture, spec.config, device)
        model.config.name_or_path = spec.name
        images = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
        return self._swap(model, images)

    def resize(self, model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
        """As every adapter's. The model's config stays the dense one: it has no word for a block's own widths."""
        resize_layers(model, end_(model, self.norms(model), params, masks), masks)
        base_of(model).get_submodule(host_of(model).patches).out_channels = int(masks["emb"].sum())
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Logits:
        """From the class token and, of a DeiT with teacher, from the distillation token."""
        host = host_of(model)
        if not host.classifiers:
            return super().logits(model, images)
        out = model(images, return_dict=True)
        if len(host.classifiers) == 1:
            return Logits(out.logits)
        return Logits(out.cls_logits, out.distillation_logits)

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """The pooled output or the embedding; where there is none, the class token, or the mean of the patches."""
        out, host = model(images), host_of(model)
        found = next(out[name] for name in host.outputs if out.get(name) is not None)
        if found.dim() == 2:
            return found
        return picked(found, self.leading(model), "class" if host.prefix else "pooled", type(model).__name__)

    def output_norm(self, model: nn.Module) -> str:
        host = host_of(model)
        if host.projection:
            return ""  # what it hands out is as wide as its projection makes it
        if host.norm_pools:
            raise ValueError(
                f"keep_output: the tokens of a {type(model).__name__} leave before its last norm, narrow; prune "
                "without it, which leaves the stream whole, or take CLIPVisionModelWithProjection"
            )
        return in_base(model, host.norm)

    def token_stream(self, model: nn.Module, images: Tensor) -> Tensor:
        return getattr(model, model.base_model_prefix, model)(images).last_hidden_state

    def leading(self, model: nn.Module) -> int:
        host = host_of(model)
        return host.prefix + getattr(model.config, "num_register_tokens", 0) if host.prefix else 0

    def new_head_(self, model: nn.Module, names: Sequence[str]) -> None:
        """Weights are drawn from N(0, 0.02²); both of a distilled model's heads are new; the config has the names."""
        if not host_of(model).classifiers or model.num_labels == 0:
            raise ValueError(f"{type(model).__name__} has no classifier to replace; take its ForImageClassification")
        for name in host_of(model).classifiers:
            old = getattr(model, name)
            fresh = nn.Linear(old.in_features, len(names)).to(old.weight)
            nn.init.trunc_normal_(fresh.weight, std=0.02)
            nn.init.zeros_(fresh.bias)
            setattr(model, name, fresh.train(model.training))
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        model.num_labels = model.config.num_labels
        model.config.problem_type = None
        self.prepare(model)

    def label_names(self, model: nn.Module) -> dict[str, int]:
        """`label2id` of the config, unless nobody has filled it in."""
        if not host_of(model).classifiers:
            return {}
        names = {str(name): int(i) for i, name in model.config.id2label.items()}
        return {} if all(name == f"LABEL_{i}" for name, i in names.items()) else names

    def preprocess(self, model: nn.Module) -> dict[str, Any]:
        """As timm's data config names it; a model of transformers does not know.

        What `model.preprocess` (a dict) says goes first, then what the image processors of its architecture's
        checkpoints do; the size is the config's own, except that DINOv2 takes any.
        """
        host, config = host_of(model), model.config
        own = {"input_size": (config.num_channels, *pair(config.image_size))}
        found = own | dict(host.images) | dict(getattr(model, "preprocess", {}))
        if not host.any_size:
            found |= own
        if len(found["mean"]) != config.num_channels:
            found |= {"mean": (0.5,) * config.num_channels, "std": (0.5,) * config.num_channels}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}

    def task(self, model: nn.Module) -> str | None:
        """By `problem_type`, and as transformers itself reads a config without one: one output is a number."""
        if not host_of(model).classifiers:
            return "features"
        problem = model.config.problem_type
        if problem is None:
            return "regression" if model.num_labels == 1 else None
        return PROBLEMS[problem]

    def tokens(self, model: nn.Module) -> int:
        return host_of(model).prefix + getattr(model.config, "num_register_tokens", 0) + self._patches(model)

    def _patches(self, model: nn.Module) -> int:
        (_, height, width), (down, across) = self.preprocess(model)["input_size"], pair(model.config.patch_size)
        return (height // down) * (width // across)

    def rest_macs(self, model: nn.Module) -> Callable[[int], int]:
        host, base = host_of(model), base_of(model)
        per_channel = base.get_submodule(host.patches).weight[0].numel() * self._patches(model)
        per_channel += len(host.classifiers) * host.reads * getattr(model, "num_labels", 0)
        readers = sum(reader.weight.shape[0] for reader in _readers(model).values())
        restored = self.restored_macs(model)
        per_channel += restored or readers
        pool = getattr(base, host.pool) if host.pool and getattr(base, "use_head", True) else None
        fixed = 0 if pool is None else probe_macs(pool, self.tokens(model))
        fixed += readers * restored_width(model) if restored else 0
        return lambda emb: per_channel * emb + fixed

    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        host, block, base = host_of(model), self.stack(model)[0], base_of(model)
        norm1, norm2 = (getattr(block, name) for name in host.norms)
        scale1, scale2 = (getattr(block, name) for name in host.scales) if host.scales else (nn.Identity(),) * 2
        attention, more = getattr(block, host.attention), {}
        if hasattr(base, "rope_embeddings"):
            like = _last_norm(model).weight
            more["position_embeddings"] = base.rope_embeddings(like.new_zeros(1, *self.preprocess(model)["input_size"]))
        return (
            lambda x: x + scale1(attention(norm1(x), **more)[0]),
            lambda x: x + scale2(block.mlp(norm2(x))),
        )


def _last_norm(model: nn.Module) -> nn.Module:
    return getattr(base_of(model), host_of(model).norm)


def _readers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a tower behind the last norm, by name."""
    host = host_of(model)
    names = [in_base(model, name) for name in host.readers] + [host.projection] * bool(host.projection)
    found = {name: _at(model, name) for name in names}
    return {name: layer for name, layer in found.items() if layer is not None}


def _at(model: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        model = getattr(model, part, None)
    return model


def _prepare_heads(model: nn.Module) -> nn.Module:
    """Make plain linear classifiers prunable, also those that a prepared model got since; returns the model."""
    host, width = host_of(model), _last_norm(model).weight.numel()
    layers = {name: (getattr(model, name), host.reads) for name in host.classifiers}
    layers |= {name: (layer, 1) for name, layer in _readers(model).items()}
    for name, (layer, reads) in layers.items():
        if type(layer) is nn.Linear:
            inputs = Layout((None, "emb"), (reads, width)) if host.classifiers else Layout.of("emb", width)
            model.set_submodule(name, with_axes(EMB, Linear(layer, inputs=inputs), layer))
    return model


def _is_plain(m: nn.Module) -> bool:
    """Whether a module has no parameters of its own, or is one that blocks have when nobody has changed them."""
    own = next(m.parameters(recurse=False), None) is not None
    return not own or type(m) in (nn.Linear, nn.LayerNorm) or type(m).__name__.endswith("LayerScale")


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's config as its JSON file holds it, without what follows from the rest."""
    plain = host_class(model).__name__ == "ViTModel" and model.pooler is None
    return dense_config(json.loads(model.config.to_json_string())) | ({POOLER: False} if plain else {})


def _attention(host: nn.Module, axes: Mapping[str, str], proj: str) -> Prunable:
    def said(*names: str) -> Any:
        return next(getattr(host, name) for name in names if hasattr(host, name))

    pairs = "half" if type(host).__name__.startswith("DINOv3") else None
    layer = TransformersAttention(
        host,
        heads=said("num_attention_heads", "num_heads"),
        qk_dim=host.head_dim // 2 if pairs else host.head_dim,
        v_dim=host.head_dim,
        scale=said("scaling", "scale"),
        inputs=("q_proj", "k_proj", "v_proj"),
        proj=proj,
        pairs=pairs,
        attn_drop=said("attention_dropout", "dropout"),
    )
    return with_axes(axes, layer, host)


def _mlp(host: nn.Module, axes: Mapping[str, str]) -> Prunable:
    if hasattr(host, "gate_proj"):
        layer = GatedMlp(host, _act(host.act_fn), first=("gate_proj", "up_proj"), last="down_proj")
    elif hasattr(host, "up_proj"):
        layer = Mlp(host, _act(host.act_fn), first="up_proj", last="down_proj")
    else:
        layer = Mlp(host, _act(host.activation_fn))
    return with_axes(axes, layer, host)


def _act(act: nn.Module) -> nn.Module:
    """transformers wraps the GELU function in a module of its own, which fused kernels do not know."""
    return nn.GELU() if getattr(act, "act", None) is F.gelu else act
