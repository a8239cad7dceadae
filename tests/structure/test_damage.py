"""A thousand kinds of damage to a snapshot: each is seen, or does not matter. And what a kill leaves is finished."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

import nvit
from nvit import snapshot
from nvit.structure.manifest import write_manifest
from nvit.utils.files import part_of
from tests.hosts import masked
from tests.structure.test_saved_as_it_is import pruned

MUTATIONS, UNCHECKED = 1000, 200
JSON_FILES = ("spec.json", "metrics.json", "manifest.json")
HUGE = (10**9, -1, 2**63, 10**400, 1e308, float("nan"), 0)


def flip_bits(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng: random.Random, file: Path) -> None:
    with open(file, "r+b") as f:
        f.truncate(rng.randrange(file.stat().st_size))


def append(rng: random.Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def zero_span(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content)


def remove(rng: random.Random, file: Path) -> None:
    file.unlink()


def become_folder(rng: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def places(value, path=()):
    """Every path to a value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, v in inside:
        yield (*path, key)
        yield from places(v, (*path, key))


def edit(rng: random.Random, file: Path, change) -> None:
    """Change one value of a JSON file: `change(its owner, its key)`."""
    raw = json.loads(file.read_text())
    path = rng.choice(list(places(raw)))
    owner = raw
    for key in path[:-1]:
        owner = owner[key]
    change(owner, path[-1])
    file.write_text(json.dumps(raw, indent=2) + "\n")


def delete_key(rng: random.Random, file: Path) -> None:
    edit(rng, file, lambda owner, key: owner.pop(key))


def huge_number(rng: random.Random, file: Path) -> None:
    edit(rng, file, lambda owner, key: owner.__setitem__(key, rng.choice(HUGE)))


def other_type(rng: random.Random, file: Path) -> None:
    values = ("x" * 100_000, None, [], {}, {"y": [[]]}, True, "../../etc", [[1] * 1000])
    edit(rng, file, lambda owner, key: owner.__setitem__(key, rng.choice(values)))


def deep_nesting(rng: random.Random, file: Path) -> None:
    file.write_text(rng.choice(("[", '{"a":', '[{"a":[')) * rng.choice((10, 3000, 200_000)))


EVERY = (flip_bits, flip_bits, flip_bits, truncate, append, zero_span, remove, become_folder)
IN_JSON = (delete_key, huge_number, other_type, deep_nesting)


def swap_files(rng: random.Random, folder: Path, other: Path) -> None:
    name = rng.choice(("spec.json", "weights.safetensors", "manifest.json", "metrics.json"))
    shutil.copy(other / name, folder / name)


def damaged(rng: random.Random, folder: Path, other: Path) -> str:
    """Damage a snapshot in one way; returns which."""
    if rng.random() < 0.05:
        swap_files(rng, folder, other)
        return "swap_files"
    name = rng.choice(("weights.safetensors", *JSON_FILES))
    change = rng.choice((*EVERY, *IN_JSON) if name in JSON_FILES else EVERY)
    change(rng, folder / name)
    return change.__name__


def loaded(folder: Path) -> tuple[str, dict | None]:
    """How loading a snapshot ends, and what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = snapshot.load(folder)
            return "loads", model.state_dict() | {"metrics": snapshot.load_metrics(folder)}
        except ValueError as e:
            assert "\n" not in str(e) and len(str(e)) < 300, e
            assert str(e).startswith(str(folder)), e
            return "is refused", None


def restored(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(v, expected[k]) if isinstance(v, torch.Tensor) else v == expected[k] for k, v in found.items()
    )


def test_a_thousand_kinds_of_damage_are_seen_or_do_not_matter(tmp_path, capsys):
    rng, counts = random.Random(13), Counter()
    other = snapshot.save(tmp_path / "other", nvit.load(nvit.BUNDLED), {"top1": 1.0})
    with torch.no_grad():
        tuned = nvit.load(nvit.BUNDLED)
        tuned.head.weight += 1
    other = snapshot.save(tmp_path / "other", tuned, {"top1": 1.0})
    _, expected = loaded(nvit.BUNDLED)
    for _ in range(MUTATIONS):
        folder = restored(nvit.BUNDLED, tmp_path / "s")
        kind = damaged(rng, folder, other)
        outcome, found = loaded(folder)
        assert outcome == "is refused" or equal(found, expected), kind
        counts[outcome] += 1
    assert counts.total() == MUTATIONS and counts["is refused"] > 0.8 * MUTATIONS
    with capsys.disabled():
        print(f"\n{MUTATIONS} kinds of damage: {counts['is refused']} refused, {counts['loads']} load bit-equal")


def test_specs_that_nobody_vouches_for_load_or_are_refused(tmp_path, capsys):
    """Changed and signed anew, or without a manifest: never another error, never much memory."""
    rng, counts = random.Random(14), Counter()
    for i in range(UNCHECKED):
        folder = restored(nvit.BUNDLED, tmp_path / "s")
        rng.choice((*IN_JSON, flip_bits, truncate))(rng, folder / "spec.json")
        (folder / "manifest.json").unlink()
        if i % 2:
            write_manifest(folder)
        counts[loaded(folder)[0]] += 1
    assert counts.total() == UNCHECKED and counts["is refused"] > 0.4 * UNCHECKED
    with capsys.disabled():
        print(f"\n{UNCHECKED} specs nobody vouches for: {counts['is refused']} refused, {counts['loads']} load")


def test_a_snapshot_from_before_manifests_loads_with_one_line(tmp_path):
    folder = restored(nvit.BUNDLED, tmp_path / "s")
    (folder / "manifest.json").unlink()
    raw = json.loads((folder / "spec.json").read_text())
    for key in ("changes", "kept", "sparse"):
        raw.pop(key)
    (folder / "spec.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match=r"s has no manifest\.json .*: its files are unchecked; save it again") as said:
        model = snapshot.load(folder)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    again = snapshot.save(tmp_path / "again", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot.load(again)


def test_weights_longer_than_their_file_are_refused_before_they_are_read(tmp_path):
    """A header that promises 8 EB, signed anew."""
    folder = restored(nvit.BUNDLED, tmp_path / "s")
    header = b'{"head.bias":{"dtype":"F32","shape":[2305843009213693951],"data_offsets":[0,9223372036854775804]}}'
    (folder / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    write_manifest(folder)
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: \d+ bytes are found, \d+ expected"):
        snapshot.load(folder)


def test_a_billion_windows_are_refused(tmp_path):
    folder = snapshot.save(tmp_path / "s", pruned("swin_three_stages"))
    raw = json.loads((folder / "spec.json").read_text())
    raw["config"]["depths"] = [10**9, 10**9]
    (folder / "spec.json").write_text(json.dumps(raw))
    write_manifest(folder)
    start = time.monotonic()
    with pytest.raises(ValueError, match="holds the number 1000000000, which is beyond any model's"):
        snapshot.load(folder)
    raw["config"]["depths"] = [10**6, 10**6]
    (folder / "spec.json").write_text(json.dumps(raw))
    write_manifest(folder)
    with pytest.raises(ValueError, match="lists 4 blocks for a model of 2000000"):
        snapshot.load(folder)
    assert time.monotonic() - start < 5


KINDS_OF_LOOK = {
    "load": snapshot.load,
    "load_spec": snapshot.load_spec,
    "load_metrics": snapshot.load_metrics,
    "is_snapshot": snapshot.is_snapshot,
    "save": lambda path: snapshot.save(path, nvit.load(nvit.BUNDLED), {"top1": 3}),
}


@pytest.mark.parametrize("look", KINDS_OF_LOOK)
@pytest.mark.parametrize("left", ["both", "old alone", "new unfinished", "new alone", "new in place"])
def test_whatever_a_kill_left_is_finished_by_whoever_looks(left, look, tmp_path):
    """Every state between the calls of a replacement, made by hand; the pid is of nobody."""
    path = tmp_path / "s"
    old, new = tmp_path / ".s.old", tmp_path / f".s.{dead_pid()}.part"
    where = path if left == "new in place" else old
    model = nvit.load(nvit.BUNDLED)
    if left != "new alone":
        snapshot.save(tmp_path / "a", model, {"top1": 1})
        (tmp_path / "a").rename(where)
    if left != "old alone":
        snapshot.save(tmp_path / "b", model, {"top1": 2})
        (tmp_path / "b").rename(new)
    if left == "new unfinished":
        (new / "manifest.json").unlink()
    if left == "new in place":
        shutil.copytree(path, old)
    assert KINDS_OF_LOOK[look](path)
    expected = {"both": 2, "old alone": 1, "new unfinished": 1, "new alone": 2, "new in place": 1}[left]
    assert snapshot.load_metrics(path)["top1"] == (3 if look == "save" else expected)
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "nothing is left beside it"


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    path = snapshot.save(tmp_path / "s", nvit.load(nvit.BUNDLED))
    theirs = part_of(path).with_name(f".s.{os.getppid()}.part")
    theirs.mkdir()
    nvit.load(path)
    assert theirs.exists()


def test_a_model_with_masks_and_a_kill_is_a_snapshot_all_the_same(tmp_path):
    """Masked, saved over an older one, whose replacement was killed: the newer of both is found."""
    model, *_ = masked("plain")
    path = snapshot.save(tmp_path / "s", model, {"top1": 1})
    path.rename(tmp_path / ".s.old")
    snapshot.save(path, model, {"top1": 2})
    assert snapshot.load_metrics(path) == {"top1": 2} and [p.name for p in tmp_path.iterdir()] == ["s"]
