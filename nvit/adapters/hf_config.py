"""The `config.json` of a pruned model of transformers: the dense model's, with what is left of every width under a key
of ours, and a `model_type` of its own, so that nobody builds the dense model from it unawares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..spec import ViTSpec
from .hf_hosts import POOLER
from .tower import KEEP_OUTPUT

KEY, PREFIX = "nvit", "nvit_"
"""Of what is left, in a config; and before the `model_type` of the dense model."""

_DERIVED = ("architectures", "dtype", "out_features", "out_indices", "stage_names", "transformers_version", KEY)
"""What follows from the rest of a config, or is no part of the dense model's."""

_BESIDE = (POOLER, KEEP_OUTPUT)
"""What a spec's config says and transformers' has no place for: it stands with what is left, under `KEY`."""


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense model's config, as JSON holds it, without what follows from the rest."""
    own = {key: value for key, value in config.items() if key not in _DERIVED}
    if "model_type" in own:
        own["model_type"] = own["model_type"].removeprefix(PREFIX)
    return own


def kept_of(spec: ViTSpec) -> dict[str, Any]:
    """What a spec says beside the host's config, for `KEY`."""
    said = json.loads(spec.to_json())
    config = said.pop("config")
    return said | {key: config[key] for key in _BESIDE if key in config}


def spec_in(config: Mapping[str, Any]) -> ViTSpec | None:
    """The spec of the pruned model that a config describes; None where it is an ordinary one.

    Raises:
        ValueError: what stands under `KEY` is damaged; `NewerFormat`, of a later format.
    """
    if not config.get(KEY):
        return None
    if not isinstance(config[KEY], Mapping):
        raise ValueError(f"{KEY} is a {type(config[KEY]).__name__}, expected an object")
    said = dict(config[KEY])
    beside = {key: said.pop(key) for key in _BESIDE if key in said}
    return ViTSpec.from_json(json.dumps(said | {"config": dense_config(config) | beside}))
