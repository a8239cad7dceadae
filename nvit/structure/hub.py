"""Snapshots on the Hugging Face hub, by timm's way of naming what lies there: `hf-hub:OWNER/NAME`, `…@REVISION`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from ..adapters import hf_folder
from ..utils.files import short
from .manifest import MANIFEST

PREFIXES = ("hf-hub:", "hf_hub:")
FILES = ("spec.json", "weights.safetensors", "metrics.json", MANIFEST)
PRUNED = [hf_folder.CONFIG, hf_folder.PROCESSOR, "model*.safetensors*"]
"""Of a pruned model of transformers."""


class NoSnapshot(ValueError):
    """The repository is there, and holds something else."""


def is_hosted(name: object) -> bool:
    """Whether a name is of something on the hub."""
    return isinstance(name, str) and name.startswith(PREFIXES)


def fetch(name: str) -> Path:
    """The folder of the snapshot that `hf-hub:OWNER/NAME` means, downloaded or out of the cache.

    Raises:
        NoSnapshot: the repository holds none.
        ValueError: there is no such repository, or nobody can be asked.
    """
    repo, revision = _parse(name)
    import huggingface_hub as hub

    for first, wanted in ((FILES[0], list(FILES)), (hf_folder.CONFIG, PRUNED)):
        with _said(name):
            file = _download(repo, first, revision)
            if file is None:
                continue
            if first == hf_folder.CONFIG and hf_folder.pruned_spec(file.parent) is None:
                raise NoSnapshot(f"{name} holds no snapshot: {FILES[0]} is missing, and {first} is not of nvit")
            # What was asked for first says which commit it is: all files are of one.
            return Path(hub.snapshot_download(repo, revision=file.parent.name, allow_patterns=wanted))
    raise NoSnapshot(f"{name} holds no snapshot: {FILES[0]} is missing")


@functools.cache
def snapshot_at(name: str) -> str | None:
    """`fetch`, or None where another kind of model lies there; or may, its config in the cache and nobody to be asked.

    Raises:
        ValueError: there is no such repository, or nobody can be asked about what is not in the cache.
    """
    try:
        return str(fetch(name))
    except NoSnapshot:
        return None
    except ValueError:
        from huggingface_hub import try_to_load_from_cache

        repo, revision = _parse(name)
        if isinstance(try_to_load_from_cache(repo, hf_folder.CONFIG, revision=revision), str):
            return None
        raise


def _download(repo: str, file: str, revision: str | None) -> Path | None:
    """A file of a repository, None where the repository has no such file."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except errors.LocalEntryNotFoundError:  # a kind of EntryNotFoundError
        raise
    except errors.EntryNotFoundError:
        return None


@contextlib.contextmanager
def _said(name: str) -> Iterator[None]:
    """What the hub's client raises, as a line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as e:
        raise ValueError(f"{name}: the hub cannot be asked, and it is not in the cache: {short(e)}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
        raise ValueError(f"{name} cannot be had: {short(e)}") from None


def _parse(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.partition(":")[2].partition("@")
    return repo, revision or None
