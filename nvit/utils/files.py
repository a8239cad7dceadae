"""Writing files and folders so that a kill or a full disk leaves the old one or the new one, never half of it, and
nothing beside it; reading JSON so that whatever is wrong is one short line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK = 2**20


def write_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write bytes, or whatever a function writes to the path it is given, then move it into place. What earlier
    processes that were killed had begun to write there is removed.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    part = part_of(path)
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        # Some writers make files for their owner alone; take what an ordinary new file would get.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """What is measured once on a machine and used again: `$NVIT_CACHE`, or `nvit` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NVIT_CACHE") or Path(base) / "nvit")


def part_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _old_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def replace_folder(part: Path, path: Path) -> None:
    """Put a folder that is whole where `path` is. There are two renames, so that a kill between them leaves no folder
    there, and both copies beside it; `settle` goes on from that."""
    if path.exists():
        path.replace(_old_of(path))
    try:
        part.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process has seen that it was missing, and settled it
            raise
    shutil.rmtree(_old_of(path), ignore_errors=True)


def settle(path: Path, whole: Callable[[Path], bool]) -> None:
    """Finish what a killed process had begun with the folder `path`: put the new copy in its place if it is `whole`,
    else the old one back; remove what is left beside it. Where nothing was begun nothing happens."""
    if not path.name:  # the folder one stands in
        return
    found, old = _parts(path), _old_of(path)
    if not path.exists():
        ready = next((part for part in found if whole(part)), old if old.exists() else None)
        if ready is not None:
            with contextlib.suppress(FileNotFoundError):  # another process settled it meanwhile
                ready.replace(path)
    if path.exists() and old.exists():
        shutil.rmtree(old, ignore_errors=True)
    if found:
        _remove_abandoned(path)


def _parts(path: Path) -> list[Path]:
    """What is or was being written to become `path`, the newest first."""
    if not path.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+\.)?part")
    found = [path.parent / entry for entry in os.listdir(path.parent) if name.fullmatch(entry)]
    return sorted((p for p in found if p.exists()), key=lambda p: p.stat().st_mtime, reverse=True)


def _remove_abandoned(path: Path) -> None:
    for part in _parts(path):
        pid = part.name.split(".")[-2]
        if not (pid.isdecimal() and _is_alive(int(pid))):
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sha256_of(path: Path) -> str:
    """Of a file's bytes, read a chunk at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def read_json(path: Path, most: int = 64 * _CHUNK) -> Any:
    """What a JSON file of at most `most` bytes holds.

    Raises:
        ValueError: it cannot be read, is too large, or is not JSON; says why in a few words, without the path.
    """
    try:
        if (size := path.stat().st_size) > most:
            raise ValueError(f"{size} bytes are more than {most}")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(short(e)) from None


def short(error: object, most: int = 120) -> str:
    """What an error says, on one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"
