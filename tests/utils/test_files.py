"""A written file is the old one or the new one, never a mixture, and nothing else is left lying about."""

import os
import subprocess
import sys

import pytest

from nvit.utils.files import read_json, write_atomically


def writer(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize("given", [lambda c: c, writer], ids=["bytes", "function"])
def test_the_new_file_takes_the_old_ones_place_at_once(tmp_path, given):
    """Who has the old file open goes on reading all of it: it was replaced, not written over."""
    path = tmp_path / "deep" / "file"
    write_atomically(path, given(b"old" * 1000))
    with open(path, "rb") as reader:
        write_atomically(path, given(b"new"))
        assert reader.read() == b"old" * 1000
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failure_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def half(part):
        part.write_bytes(b"ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_had_begun_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = (f".file.{dead.pid}.part", f".file.{os.getppid()}.part", f".file.txt.{dead.pid}.part", ".file.old.part")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "file", b"whole")
    assert {p.name for p in tmp_path.iterdir()} == {"file", *names[1:]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "recursion"),
        (b"\x80abc", "decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"' + b"x" * 1000, "Unterminated"),
        (b" " * 2000, "2000 bytes are more than 1500"),
    ],
)
def test_json_that_cannot_be_read_is_a_few_words(tmp_path, content, says):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        read_json(tmp_path / "f.json", 1500 if len(content) == 2000 else 2**20)
    assert len(str(e.value)) <= 120 and "\n" not in str(e.value)


def test_the_umask_is_followed(tmp_path):
    def private(part):
        part.touch(mode=0o600)

    write_atomically(tmp_path / "file", private)
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
