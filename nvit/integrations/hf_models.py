"""Pruned models as classes of transformers, with `save_pretrained`, `from_pretrained`, `push_to_hub` and a place among
the Auto classes.

A config of transformers has one width for all blocks. So every class that can be pruned has a subclass here, whose
config holds the dense model's with what is left of every width beside it (`nvit.adapters.hf_config`), and which builds
the dense model and cuts it before weights are loaded. Nothing of a forward pass is ours.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import adapters
from ..adapters import hf_folder, hf_hosts
from ..adapters.base import host_class
from ..adapters.hf_config import KEY, PREFIX, kept_of, spec_in
from ..adapters.hf_hosts import POOLER
from ..adapters.restore import restore_
from ..adapters.tower import KEEP_OUTPUT
from ..layers import prunable_layers
from ..spec import ViTSpec
from ..structure.compact import compact
from ..structure.masks import masks_of
from ..structure.skeleton import check_sizes, narrow_
from ..structure.snapshot import spec_of
from ..structure.verify import check_function
from ..utils.files import write_atomically

transformers = hf_hosts.library()


class Pruned:
    """What a pruned model does otherwise than the class of transformers that it comes from.

    Attributes:
        host_class: that class.
    """

    host_class: ClassVar[type]

    def __init__(self, config: Any, *args: Any, **more: Any) -> None:
        spec = spec_in(json.loads(config.to_json_string()))
        if spec is None:
            super().__init__(config, *args, **more)
            return
        super().__init__(config, *args, **_arguments(type(self), spec) | more)
        self.preprocess = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.preprocess.items()}
        check_sizes(spec)
        adapter, cpu = adapters.find(self), torch.device("cpu")
        with cpu:  # tables and masks have values, also where the model is built without any
            adapter.prepare(self)
        if (width := spec.config.get(KEEP_OUTPUT)) is not None:
            restore_(adapter, self, width)
        with cpu:
            narrow_(self, spec)

    def initialize_weights(self) -> None:
        """As transformers' own, for what no file holds; so it is with tables of prunable layers, which loading has
        emptied."""
        super().initialize_weights()
        for layer in prunable_layers(self).values():
            layer.keep_all_()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **more: Any) -> None:
        """As transformers' own; weights keep their names (`save_original_format=False`), and the config says what the
        model is as it stands now."""
        setattr(self.config, KEY, kept_of(spec_of(self)))
        super().save_pretrained(save_directory, *args, **{"save_original_format": False} | more)


def _arguments(cls: type[Pruned], spec: ViTSpec) -> dict[str, Any]:
    """What a class takes beside its config to build the model that a spec describes; or its tower, or a classifier on
    it, whose weights transformers finds by their names.

    Raises:
        ValueError: weights of the described class have other names, so that none would be found.
    """
    mine, theirs = cls.host_class.__name__, spec.architecture
    if mine == theirs:
        return {key: value for key, value in spec.config.items() if key == POOLER}
    bases = {host.base for name in (mine, theirs) if (host := hf_hosts.ARCHITECTURES.get(name)) is not None}
    if len(bases) < 2 or not bases <= {"", cls.base_model_prefix}:
        raise ValueError(
            f"it holds a pruned {theirs}, whose weights have other names than those of a {mine}; load it as "
            f"Nvit{theirs}, or with nvit.load"
        )
    return {}


def _config_class(base: type) -> type:
    """A config of transformers with room for what is left, under a `model_type` of its own."""
    own = {"model_type": PREFIX + base.model_type, KEY: None, "__annotations__": {KEY: dict | None}}
    return type(f"Nvit{base.__name__}", (base,), own | {"__module__": __name__})


def _classes() -> dict[str, type]:
    """The class of pruned models for every class that can be pruned."""
    configs: dict[type, type] = {}
    found = {}
    for architecture in hf_hosts.ARCHITECTURES:
        host = getattr(transformers, architecture)
        config = configs.setdefault(host.config_class, None) or _config_class(host.config_class)
        configs[host.config_class] = config
        own = {
            "config_class": config,
            "host_class": host,
            "__module__": __name__,
            "__doc__": f"A pruned {architecture}.",
        }
        found[architecture] = type(f"Nvit{architecture}", (Pruned, host), own)
    return found


CLASSES: dict[str, type] = _classes()
"""By the architecture that they are pruned of."""

globals().update({cls.__name__: cls for cls in CLASSES.values()})
globals().update({cls.config_class.__name__: cls.config_class for cls in CLASSES.values()})


def _register() -> None:
    """Give every class its places among the Auto classes: those of the class that it is pruned of."""
    for config in {cls.config_class for cls in CLASSES.values()}:
        base = config.__mro__[1]
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        processors = importlib.import_module("transformers.models.auto.image_processing_auto").IMAGE_PROCESSOR_MAPPING
        if base in processors:
            processors.register(config, processors[base], exist_ok=True)
        for auto in vars(importlib.import_module("transformers.models.auto.modeling_auto")).values():
            mapping = getattr(auto, "_model_mapping", None)
            if not isinstance(auto, type) or mapping is None or base not in mapping:
                continue
            hosts = mapping[base]
            hosts = hosts if isinstance(hosts, (tuple, list)) else (hosts,)
            mine = tuple(CLASSES[h.__name__] for h in hosts if h.__name__ in CLASSES)
            if mine:
                auto.register(config, mine if len(mine) > 1 else mine[0], exist_ok=True)


_register()


def pretrained(model: nn.Module) -> nn.Module:
    """A pruned model of transformers as its class here, with the same weights: it saves, loads and goes to the hub as
    any other of transformers. What it computes is the same, and nvit takes it as before.

    Args:
        model: dense or compact, of `nvit.prune` or `nvit.load`; a masked one is made compact first.

    Raises:
        ValueError: it is no model of transformers that can be pruned, or was changed in a way that no spec says.

    >>> config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=16)
    >>> model = nvit.hf.pretrained(transformers.ViTForImageClassification(config))
    >>> type(model).__name__, isinstance(model, transformers.ViTForImageClassification)
    ('NvitViTForImageClassification', True)
    """
    adapter = adapters.find(model)
    if (cls := CLASSES.get(host_class(model).__name__)) is None:
        raise ValueError(f"{type(model).__name__} is no model of transformers; save it with nvit.snapshot.save")
    adapter.prepare(model)
    if (masks := masks_of(model)) is not None:
        model = compact(model, adapter.groups(model), masks)
    spec = spec_of(model)
    check_function(model, spec, model.state_dict())
    config = cls.config_class(**json.loads(model.config.to_json_string()) | {KEY: kept_of(spec)})
    config.name_or_path, config.architectures = model.config.name_or_path, [cls.__name__]
    with torch.device("meta"):
        twin = cls(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    hf_hosts.fill_tables_(twin)
    for layer in prunable_layers(twin).values():
        layer.keep_all_()
    return twin.train(model.training).to(next(model.parameters()).device)


def save_pretrained(model: nn.Module, folder: str | Path, processor: Any = None, **more: Any) -> Path:
    """Write a pruned model of transformers, and how its images are prepared, to a folder that `from_pretrained` opens
    wherever `nvit.hf` was imported.

    Args:
        processor: the image processor to save beside it; made of the model's own preprocessing when None.
        more: for `save_pretrained` of transformers (`max_shard_size`, `push_to_hub`, …).

    Raises:
        ValueError: as `pretrained`; or its images are prepared in a way that no processor file can say.

    >>> config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=16)
    >>> folder = nvit.hf.save_pretrained(transformers.ViTForImageClassification(config), "small_vit")
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    folder, twin = Path(folder), pretrained(model)
    images = hf_folder.to_processor(adapters.preprocess(twin)) if processor is None else None
    twin.save_pretrained(folder, **more)
    if images is None:
        processor.save_pretrained(folder)
    else:
        write_atomically(folder / hf_folder.PROCESSOR, (json.dumps(images, indent=2) + "\n").encode())
    return folder
