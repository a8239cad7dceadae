"""A written file is the old one or the new one, never a mixture, and nothing else is left lying about."""

import pytest

from nvit.utils.files import write_atomically


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


def test_the_umask_is_followed(tmp_path):
    def private(part):
        part.touch(mode=0o600)

    write_atomically(tmp_path / "file", private)
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
