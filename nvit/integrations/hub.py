"""Snapshots onto the Hugging Face hub, with a model card; `nvit.load("hf-hub:OWNER/NAME")` gets them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..structure.hub import FILES
from ..structure.manifest import MANIFEST, check_manifest
from ..structure.snapshot import is_snapshot
from ..utils.files import write_atomically
from .card import UNKNOWN, model_card

CARD = "README.md"


def write_card(folder: str | Path, repo: str = "", **about: Any) -> Path:
    """Write the card of a snapshot into its folder, which stays whole: its manifest says nothing of `README.md`.

    Args:
        about: as `model_card` takes it.

    >>> import shutil
    >>> folder = shutil.copytree(nvit.BUNDLED, "digits")
    >>> nvit.hub.write_card(folder, license="cc-by-4.0").name
    'README.md'
    """
    file = Path(folder) / CARD
    write_atomically(file, str(model_card(folder, repo, **about)).encode())
    return file


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "A model pruned with nvit",
    license: str = UNKNOWN,
    base_model: str | None = None,
    data: str = "",
) -> str:
    """Upload a snapshot with its card, in one commit; the repository is made where there is none.

    Files are checked against the manifest first. A card that lies in the folder goes up as it is.

    Args:
        folder: a snapshot, as `result.save` or `nvit.snapshot.save` wrote it.
        repo: `OWNER/NAME`.
        private, revision, token: as huggingface_hub takes them.
        license, base_model, data: for the card, see `model_card`.

    Returns:
        What `nvit.load` takes to get it back.

    Raises:
        ValueError: no snapshot, one without a manifest, or a damaged one; nothing was uploaded.
        huggingface_hub.errors.HfHubHTTPError: the hub refused.

    >>> nvit.hub.push_to_hub("nvit_b/target-0.54", "me/nvit-b", license="apache-2.0")  # doctest: +SKIP
    'hf-hub:me/nvit-b'
    """
    folder = Path(folder)
    if not is_snapshot(folder):
        raise ValueError(f"{folder} is not a snapshot: {FILES[0]} is missing; result.save writes one")
    if not check_manifest(folder):
        raise ValueError(f"{folder} has no {MANIFEST}: nobody can tell whether it is whole; load it and save it again")
    given = folder / CARD
    about = {"license": license, "base_model": base_model, "data": data}
    card = given.read_bytes() if given.is_file() else str(model_card(folder, repo, **about)).encode()
    files = {name: str(folder / name) for name in FILES if (folder / name).is_file()}
    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, what) for name, what in (files | {CARD: card}).items()]
    api.create_commit(repo, operations, commit_message=message, revision=revision)
    return f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
