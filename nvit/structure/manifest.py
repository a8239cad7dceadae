"""What a snapshot's files were when it was saved: `manifest.json`, with the size and sha256 of each, and as its last
line the sha256 of the lines above it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..spec import FORMAT, NewerFormat, check_format
from ..utils.files import read_json, sha256_of, short, write_atomically

MANIFEST = "manifest.json"
_LONGEST = 2**20


def write_manifest(folder: Path) -> None:
    """Write the manifest of what lies in a folder, at last."""
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name != MANIFEST
    }
    body = json.dumps({"format": FORMAT, "files": files}, indent=2).removesuffix("\n}") + ",\n"
    write_atomically(folder / MANIFEST, (body + _last_line(body)).encode())


def check_manifest(folder: Path, *names: str) -> bool:
    """Whether a folder has a manifest; checks the files that it lists (of these `names`, if any are given) against it.

    Raises:
        ValueError: a file is missing or another than when it was saved, or the manifest itself is; one short line.
    """
    if not (folder / MANIFEST).exists():
        return False
    files = _listed(folder / MANIFEST)
    for name, said in files.items():
        if names and name not in names:
            continue
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} is not a snapshot: {name} is missing, which {MANIFEST} lists")
        if (size := file.stat().st_size) != said["bytes"]:
            raise _damaged(file, f"{size} bytes, {MANIFEST} says {said['bytes']}")
        if sha256_of(file) != said["sha256"]:
            raise _damaged(file, f"its sha256 is not the one in {MANIFEST}")
    if gone := next((name for name in names if name not in files), None):
        raise _damaged(folder / MANIFEST, f"it does not list {gone}")
    return True


def is_whole(folder: Path) -> bool:
    """Whether a folder is a snapshot that was written to its end, none of it damaged."""
    try:
        return check_manifest(folder)
    except (ValueError, OSError):
        return False


def _listed(file: Path) -> dict[str, dict]:
    """The files that a manifest lists, once its last line says that it is as it was written."""
    try:
        if (size := file.stat().st_size) > _LONGEST:
            raise ValueError(f"{size} bytes are too many")
        body, newline, last = file.read_bytes().decode().removesuffix("\n").rpartition("\n")
        raw = read_json(file)
        check_format(raw["format"])
        if last + "\n" != _last_line(body + newline):
            raise ValueError("its last line does not fit the lines above it")
        return raw["files"]
    except NewerFormat as e:
        raise ValueError(f"{file.parent} {e}") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise _damaged(file, short(e)) from None


def _last_line(body: str) -> str:
    return f'  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged: {why}; copy the snapshot again, or save it anew")
