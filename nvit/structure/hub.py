"""Snapshots on the Hugging Face hub, by timm's way of naming what lies there: `hf-hub:OWNER/NAME`, `…@REVISION`."""

from __future__ import annotations

import functools
from pathlib import Path

from ..adapters import hf_folder
from ..utils.files import short
from .manifest import MANIFEST

PREFIXES = ("hf-hub:", "hf_hub:")
FILES = ("spec.json", "weights.safetensors", "metrics.json", MANIFEST)


def is_hosted(name: object) -> bool:
    """Whether a name is of something on the hub."""
    return isinstance(name, str) and name.startswith(PREFIXES)


def fetch(name: str) -> Path:
    """The folder of the snapshot that `hf-hub:OWNER/NAME` means, downloaded or out of the cache.

    Raises:
        ValueError: there is no such repository, it holds no snapshot, or nobody can be asked.
    """
    repo, revision = _parse(name)
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        file = Path(hub.hf_hub_download(repo, FILES[0], revision=revision))
    except errors.LocalEntryNotFoundError as e:  # a kind of EntryNotFoundError: nobody could be asked
        raise ValueError(f"{name} cannot be had, and is not in the cache: {short(e)}") from None
    except errors.EntryNotFoundError:
        return _pruned(name, repo, revision)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
        raise ValueError(f"{name} cannot be had: {short(e)}") from None
    try:
        # What was asked for first says which commit it is: all files are of one.
        return Path(hub.snapshot_download(repo, revision=file.parent.name, allow_patterns=list(FILES)))
    except (errors.HfHubHTTPError, OSError) as e:
        raise ValueError(f"{name} cannot be had: {short(e)}") from None


@functools.cache
def snapshot_at(name: str) -> str | None:
    """`fetch`, or None where that is no snapshot that can be had: another kind of model may lie there."""
    try:
        return str(fetch(name))
    except ValueError:
        return None


def _pruned(name: str, repo: str, revision: str | None) -> Path:
    """The folder of a pruned model of transformers."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        file = Path(hub.hf_hub_download(repo, hf_folder.CONFIG, revision=revision))
        if hf_folder.pruned_spec(file.parent) is None:
            raise ValueError(f"{name} holds no snapshot: {FILES[0]} is missing, and {hf_folder.CONFIG} is not of nvit")
        wanted = [hf_folder.CONFIG, hf_folder.PROCESSOR, "model*.safetensors*"]
        return Path(hub.snapshot_download(repo, revision=file.parent.name, allow_patterns=wanted))
    except errors.EntryNotFoundError:
        raise ValueError(f"{name} holds no snapshot: {FILES[0]} is missing") from None
    except (errors.HfHubHTTPError, OSError) as e:
        raise ValueError(f"{name} cannot be had: {short(e)}") from None


def _parse(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition(":")[2].partition("@")
    return repo, revision or None
