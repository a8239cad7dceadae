"""Image classifiers of Hugging Face transformers: ViT, DeiT with one classifier or two, DINOv2 and its registers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Attention, GatedMlp, LayerScale, Layout, Linear, Mlp, Prunable, StreamEntry
from ..spec import Part, Slice, ViTSpec
from .base import Logits, host_class
from .declare import EMB, block_axes, embedding_slices, norm, resize_layers, with_axes
from .hf_config import dense_config
from .hf_hosts import ARCHITECTURES, dense, host_of, pair, too_old
from .one_stream import OneStream

PROBLEMS = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
"""Names of tasks by those of transformers' `problem_type`."""


class _Attention(Attention):
    """Called as transformers' blocks call theirs: the second output is for attention weights, which nobody computes."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **_: Any
    ) -> tuple[Tensor, None]:
        if output_attentions:
            raise ValueError("a prunable model computes no attention weights; leave out output_attentions")
        return self.attend(hidden_states, attention_mask), None


class HFViT(OneStream):
    """The adapter of transformers' ViT, DeiT and DINOv2."""

    family = "hf_vit"
    depth_key = "num_hidden_layers"

    def merge_refusal(self, model: nn.Module) -> str | None:
        return "transformers runs its layers one by one; take the same model from timm"

    def knows(self, model: nn.Module) -> bool:
        return host_class(model).__module__.startswith("transformers.models.")

    def refusal(self, model: nn.Module) -> str | None:
        if host_class(model).__name__ not in ARCHITECTURES:
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
        host, base = host_of(model), model.base_model
        model.dense_config, model.preprocess = {}, dict(images)  # its config says the rest, see `settings`
        model.set_attn_implementation("sdpa")  # the masks that prunable attention takes
        dropout = base.embeddings.dropout
        base.embeddings.dropout = nn.Sequential(dropout, with_axes(EMB, StreamEntry(), dropout))
        for i, layer in enumerate(self.stack(model)):
            attention_axes, mlp_axes = block_axes(f"blocks.{i}")
            for name in host.norms:
                setattr(layer, name, norm(getattr(layer, name), EMB))
            for name in host.scales:
                scale = getattr(layer, name)
                setattr(layer, name, with_axes(EMB, LayerScale(scale.lambda1, "lambda1"), scale))
            layer.attention = _attention(layer.attention, attention_axes)
            layer.mlp = _mlp(layer.mlp, mlp_axes)
        base.layernorm = norm(base.layernorm, EMB)
        return _prepare_heads(model)

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """The model's config as it is now. Its widths stay the dense model's: it has no word for a block's own."""
        return _config(model)

    def extent(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        image, patch = (pair(config.get(key, 1)) for key in ("image_size", "patch_size"))
        tokens = (image[0] // max(1, patch[0])) * (image[1] // max(1, patch[1]))
        return config.get("num_hidden_layers", 0), tokens, config.get("hidden_size", 0)

    def stack(self, model: nn.Module) -> nn.ModuleList:
        return model.base_model.get_submodule(host_of(model).layers)

    def emb(self, model: nn.Module) -> int:
        return model.base_model.layernorm.weight.numel()

    def embeddings(self, model: nn.Module) -> list[Slice]:
        prefix, embeddings = f"{model.base_model_prefix}.embeddings.", model.base_model.embeddings
        patches = {f"{prefix}patch_embeddings.projection.{leaf}": 0 for leaf in ("weight", "bias")}
        tokens = {f"{prefix}{name}": p.dim() - 1 for name, p in embeddings.named_parameters(recurse=False)}
        return embedding_slices(model, tokens | patches, patches)

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
        resize_layers(model, params, masks)
        model.base_model.embeddings.patch_embeddings.projection.out_channels = int(masks["emb"].sum())
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Logits:
        """From the class token and, of a DeiT with teacher, from the distillation token."""
        out = model(images, return_dict=True)
        if len(host_of(model).classifiers) == 1:
            return Logits(out.logits)
        return Logits(out.cls_logits, out.distillation_logits)

    def label_names(self, model: nn.Module) -> dict[str, int]:
        """`label2id` of the config, unless nobody has filled it in."""
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
        problem = model.config.problem_type
        if problem is None:
            return "regression" if model.num_labels == 1 else None
        return PROBLEMS[problem]

    def tokens(self, model: nn.Module) -> int:
        embeddings, config = model.base_model.embeddings, model.config
        prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
        prefix += getattr(config, "num_register_tokens", 0)
        return prefix + self._patches(model)

    def _patches(self, model: nn.Module) -> int:
        (_, height, width), (down, across) = self.preprocess(model)["input_size"], pair(model.config.patch_size)
        return (height // down) * (width // across)

    def rest_macs(self, model: nn.Module) -> Callable[[int], int]:
        host, projection = host_of(model), model.base_model.embeddings.patch_embeddings.projection
        conv = projection.weight[0].numel() * self._patches(model)
        outputs = len(host.classifiers) * host.reads * model.num_labels
        return lambda emb: (conv + outputs) * emb

    def steps(self, model: nn.Module, part: Part) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        host, block = host_of(model), self.stack(model)[0]
        norm1, norm2 = (getattr(block, name) for name in host.norms)
        scale1, scale2 = (getattr(block, name) for name in host.scales) if host.scales else (nn.Identity(),) * 2
        return (
            lambda x: x + scale1(block.attention(norm1(x))[0]),
            lambda x: x + scale2(block.mlp(norm2(x))),
        )


def _prepare_heads(model: nn.Module) -> nn.Module:
    """Make plain linear classifiers prunable, also those that a prepared model got since; returns the model."""
    host = host_of(model)
    inputs = Layout((None, "emb"), (host.reads, model.base_model.layernorm.weight.numel()))
    for name in host.classifiers:
        classifier = getattr(model, name)
        if type(classifier) is nn.Linear:
            setattr(model, name, with_axes(EMB, Linear(classifier, inputs=inputs), classifier))
    return model


def _is_plain(m: nn.Module) -> bool:
    """Whether a module has no parameters of its own, or is one that blocks have when nobody has changed them."""
    own = next(m.parameters(recurse=False), None) is not None
    return not own or type(m) in (nn.Linear, nn.LayerNorm) or type(m).__name__.endswith("LayerScale")


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's config as its JSON file holds it, without what follows from the rest."""
    return dense_config(json.loads(model.config.to_json_string()))


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
