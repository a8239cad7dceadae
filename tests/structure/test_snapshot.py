"""Snapshots and run states: strict to read, whole or absent on disk, plain data."""

import hashlib
import json
import random
import resource
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nvit
from nvit import adapters, snapshot
from nvit.spec import FORMAT, ViTSpec
from nvit.structure import snapshot as finishing
from nvit.structure.compact import compact
from nvit.structure.manifest import write_manifest
from nvit.structure.masks import widths
from tests.hosts import images, make, masked

KILLED_SAVES = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from nvit import snapshot
root, event_count = Path(sys.argv[1]), 0
new = snapshot.load(root / "new")
snapshot.save(root / "new", new)  # what is imported or cached by then, every child has

def die_at(n):
    def hook(event, args):
        global event_count
        if event.startswith(("open", "os.", "shutil.")) and str(root) in str(args):
            event_count += 1
            if event_count > n:
                os._exit(9)
    sys.addaudithook(hook)

for n in range(400):
    if os.fork() == 0:
        die_at(n)
        snapshot.save(root / "s", new)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    gone = not (root / "s").exists()
    seen = snapshot.load(root / "s").blocks[0].mlp.fc1.out_features
    print(n, code, seen, gone, *(p.name for p in root.iterdir() if p.name.startswith(".")))
    if code == 0:
        break
    if seen != int(sys.argv[2]):
        os.system(f"rm -rf {root}/s && cp -r {root}/old {root}/s")
"""


@contextmanager
def disk_full_after(size: int):
    """Files longer than `size` bytes cannot be written: the system refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small(keep: float = 0.6, host: str = "plain"):
    return compact(*masked(host, keep))


@pytest.fixture
def saved(tmp_path):
    return snapshot.save(tmp_path / "s", small(), {"top1": 81.5})


def one_line(error) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_snapshot_is_plain_files_and_what_they_were(saved):
    files = ["manifest.json", "metrics.json", "spec.json", "weights.safetensors"]
    assert sorted(p.name for p in saved.iterdir()) == files
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == FORMAT and list(manifest["files"]) == files[1:]
    for name, said in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    *lines, last = (saved / "manifest.json").read_text().splitlines(keepends=True)
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == last.split('"')[3] == manifest["sha256"]
    assert [p.name for p in saved.parent.iterdir()] == ["s"]
    assert json.loads((saved / "metrics.json").read_text()) == {"top1": 81.5} == snapshot.load_metrics(saved)
    assert ViTSpec.from_json((saved / "spec.json").read_text()).blocks[0].emb == 29
    assert load_file(saved / "weights.safetensors").keys() == make("plain").state_dict().keys()
    for path in saved.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, "others may read it where the umask lets them"


def test_loaded_model_is_ready_for_inference(saved):
    model = snapshot.load(saved)
    assert not model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    torch.testing.assert_close(model(images(model)), small()(images(model)), rtol=0, atol=0)


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    again = snapshot.save(tmp_path / "again", snapshot.load(saved), snapshot.load_metrics(saved))
    for name in ("spec.json", "weights.safetensors", "metrics.json", "manifest.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_half_precision_survives(tmp_path):
    model = small().to(torch.bfloat16)
    loaded = snapshot.load(snapshot.save(tmp_path / "s", model))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_the_dtype_asked_for_and_finishers_come_last_and_only_where_they_may(saved, monkeypatch):
    seen = []
    monkeypatch.setattr(finishing, "FINISHERS", [lambda model: seen.append(model.head.weight.dtype)])
    assert snapshot.load(saved, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]
    assert snapshot.load(saved, sparse=False).head.weight.dtype == torch.float32 and len(seen) == 1


def test_nvit_load_is_the_snapshots_own_and_finishes_2to4():
    assert nvit.load is snapshot.load
    assert [f.__module__ for f in finishing.FINISHERS] == ["nvit.sparse24.backends"]


def test_an_image_size_that_timm_does_not_know_is_in_the_spec(saved):
    assert snapshot.load_spec(saved).preprocess["input_size"] == [3, 16, 16]


@pytest.mark.parametrize("name", ["spec.json", "weights.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"is not a snapshot: {name} is missing") as e:
        snapshot.load(saved)
    assert one_line(e)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a snapshot: spec\.json is missing"):
        snapshot.load(tmp_path / "nowhere")


def edit(change):
    def apply(path):
        raw = json.loads((path / "spec.json").read_text())
        change(raw)
        (path / "spec.json").write_text(json.dumps(raw))

    return apply


HUGE = 10**9


DAMAGED_SPECS = {
    "not JSON": lambda p: (p / "spec.json").write_text('{"family": "timm_vit", '),
    "not text": lambda p: (p / "spec.json").write_bytes(b"\xff\xfe\x00\x01"),
    "a list": lambda p: (p / "spec.json").write_text("[1, 2]"),
    "field missing": edit(lambda r: r.pop("blocks")),
    "field unknown": edit(lambda r: r.update(colour="red")),
    "another family": edit(lambda r: r.update(family="timm_swin")),
    "another architecture": edit(lambda r: r.update(architecture="Transformer")),
    "unknown argument": edit(lambda r: r["config"].update(windows=7)),
    "argument of another type": edit(lambda r: r["config"].update(embed_dim="wide")),
    "activation unknown": edit(lambda r: r["config"].update(act_layer="swish9")),
    "indivisible heads": edit(lambda r: r["config"].update(num_heads=5)),
    "config no table": edit(lambda r: r.update(config=[1])),
    "too few blocks": edit(lambda r: r["blocks"].pop()),
    "blocks no list": edit(lambda r: r.update(blocks=7)),
    "block no table": edit(lambda r: r.update(blocks=[1, 2])),
    "width zero": edit(lambda r: r["blocks"][0].update(qk_dim=0)),
    "width a fraction": edit(lambda r: r["blocks"][0].update(mlp=1.5)),
    "width a bool": edit(lambda r: r["blocks"][0].update(heads=True)),
    "width missing": edit(lambda r: r["blocks"][0].pop("qk_dim")),
    "wider than dense": edit(lambda r: r["blocks"][0].update(mlp=97)),
    "two widths of one stream": edit(lambda r: r["blocks"][0].update(emb=30)),
    "nested too deep": lambda p: (p / "spec.json").write_text("[" * 100_000),
    "long field names": edit(lambda r: r.update({"x" * 100_000: 1})),
    "a billion blocks": edit(lambda r: r["config"].update(depth=HUGE)),
    "a billion channels": edit(lambda r: r["config"].update(embed_dim=HUGE)),
    "a billion pixels a side": edit(lambda r: r["config"].update(img_size=[HUGE, HUGE])),
    "a number of 4000 digits": lambda p: (p / "spec.json").write_text(f'{{"depth": {"9" * 4000}}}'),
    "infinitely wide": edit(lambda r: r["config"].update(mlp_ratio=float("inf"))),
    "kept no table": edit(lambda r: r.update(kept=[1])),
    "a change of nothing": edit(lambda r: r.update(changes={"blocks.7.attn": {"scale": 1.0}})),
    "a change of what is no number": edit(lambda r: r.update(changes={"blocks.0.attn": {"kept": 1}})),
    "a change to another layer": edit(lambda r: r.update(changes={"blocks.0.mlp": {"layer": "relu"}})),
}


@pytest.mark.parametrize("signed", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("damage", DAMAGED_SPECS.values(), ids=DAMAGED_SPECS)
def test_a_damaged_spec_gives_one_line(saved, damage, signed):
    """Also where nobody can tell that it is not as it was saved: it makes no model, and nothing large on the way."""
    damage(saved)
    if signed:
        with pytest.raises(ValueError, match=r"spec\.json is damaged: .*manifest\.json"):
            snapshot.load(saved)
    (saved / "manifest.json").unlink()
    if signed:
        write_manifest(saved)
    before, quiet = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, pytest.warns if not signed else nullcontext
    with (
        quiet(*() if signed else (UserWarning,)),
        pytest.raises(ValueError, match=r"spec\.json is damaged or from another version") as e,
    ):
        snapshot.load(saved)
    assert one_line(e)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


def change_weights(change):
    def apply(file):
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return apply


def cut_short(share: float):
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


DAMAGED_WEIGHTS = {
    "empty": lambda f: f.write_bytes(b""),
    "header cut short": lambda f: f.write_bytes(f.read_bytes()[:40]),
    "cut short": cut_short(0.5),
    "a byte short": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "noise": lambda f: f.write_bytes(b"\x93NUMPY" * 1000),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "parameter missing": change_weights(lambda w: w.pop("head.bias")),
    "parameter unknown": change_weights(lambda w: w.update({"head.scale": torch.ones(2)})),
    "another shape": change_weights(lambda w: w.update({"blocks.0.mlp.fc1.bias": torch.ones(57)})),
}


@pytest.mark.parametrize("signed", [True, False], ids=["as saved", "signed anew"])
@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS.values(), ids=DAMAGED_WEIGHTS)
def test_damaged_weights_give_one_line(saved, damage, signed):
    damage(saved / "weights.safetensors")
    if not signed:
        write_manifest(saved)
    with pytest.raises(ValueError, match=r"weights\.safetensors (is damaged|does not fit|is missing)") as e:
        snapshot.load(saved)
    assert one_line(e)


def test_damaged_metrics_give_one_line(saved):
    (saved / "metrics.json").write_text('{"top1": ')
    write_manifest(saved)
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        snapshot.load_metrics(saved)


def test_weights_of_another_width_do_not_fit(saved, tmp_path):
    other = snapshot.save(tmp_path / "other", small(keep=0.5))
    (other / "weights.safetensors").replace(saved / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: \d+ bytes, manifest\.json says \d+"):
        snapshot.load(saved)
    write_manifest(saved)
    with pytest.raises(ValueError, match=r"does not fit spec\.json: \S+ is \(.*\), expected \(.*\)"):
        snapshot.load(saved)


def test_a_pickle_is_not_read(saved):
    torch.save(make("plain").state_dict(), saved / "weights.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        snapshot.load(saved)


def test_a_folder_that_is_no_snapshot_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="exists and is not a snapshot; choose another folder"):
            snapshot.save(tmp_path / name, small())
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]


def test_an_older_snapshot_is_replaced(saved):
    snapshot.save(saved, small(keep=0.4), {"top1": 70.0})
    assert snapshot.load_metrics(saved) == {"top1": 70.0}
    assert snapshot.load(saved).embed_dim == 19
    assert [p.name for p in saved.parent.iterdir()] == ["s"]


def test_a_kill_at_any_moment_leaves_the_old_snapshot_or_the_new_one(tmp_path):
    """A child is ended before every file system call of a save, one after another; what is there always loads, and then
    nothing is left beside it. Between two renames there is no folder, until somebody looks.
    """
    old, new = small(keep=0.6), small(keep=0.4)
    for name, model in {"old": old, "new": new, "s": old}.items():
        snapshot.save(tmp_path / name, model)
    narrow, wide = (m.blocks[0].mlp.fc1.out_features for m in (new, old))
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path), str(wide)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[-1][1:3] == ["0", str(narrow)]
    assert len(rows) > 10 and all(code == "9" for _, code, *_ in rows[:-1])
    assert {found for _, _, found, *_ in rows} == {str(wide), str(narrow)}
    between = [found for _, _, found, gone, *_ in rows if gone == "True"]
    assert between == [str(narrow)], "found missing once, between the renames; the new one was finished"
    assert all(len(row) == 4 for row in rows), "nothing is left beside them"


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_leaves_the_old_snapshot(saved, size):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with disk_full_after(size), pytest.raises(OSError, match=r"cannot be written|too large"):
        snapshot.save(saved, small(keep=0.9))
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["s"]


def test_run_state_round_trip_is_exact(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "flags": torch.tensor([True, False]),
        "n": torch.tensor(3),
        "h": torch.ones(2).half(),
    }
    values = {"step": 7, "nested": {"x": [0.1, 1e-300, 2**60]}, "none": None}
    snapshot.save_run_state(tmp_path / "state", tensors, values)
    got, plain = snapshot.load_run_state(tmp_path / "state")
    assert plain == values and got.keys() == tensors.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in tensors.items())


def test_a_full_disk_leaves_the_old_run_state(tmp_path):
    file = tmp_path / "state"
    snapshot.save_run_state(file, {"a": torch.zeros(10)}, {"step": 1})
    with disk_full_after(2000), pytest.raises(OSError, match="cannot be written"):
        snapshot.save_run_state(file, {"a": torch.zeros(10_000)}, {"step": 2})
    assert snapshot.load_run_state(file)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("content", [None, b"", b"half a", b"\x00" * 64])
def test_damaged_run_states_give_one_line(tmp_path, content):
    file = tmp_path / "state"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a run state .*start the run without --resume") as e:
        snapshot.load_run_state(file)
    assert one_line(e)


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_bit_of_a_run_state_is_seen(tmp_path, seed):
    rng, file = random.Random(seed), tmp_path / "state"
    tensors = {"a": torch.randn(30, 4), "n": torch.tensor(3), "none": torch.empty(0), "h": torch.ones(5).bfloat16()}
    snapshot.save_run_state(file, tensors, {"step": 7})
    assert torch.equal(snapshot.load_run_state(file)[0]["a"], tensors["a"])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="start the run without --resume") as e:
        snapshot.load_run_state(file)
    assert one_line(e)


def test_a_run_state_from_before_they_were_signed_loads_with_one_line(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "state", metadata={"values": '{"step": 1}'})
    with pytest.warns(UserWarning, match="is from before run states were signed: it is unchecked"):
        assert snapshot.load_run_state(tmp_path / "state")[1] == {"step": 1}


def test_a_snapshots_weights_are_no_run_state(saved):
    with pytest.raises(ValueError, match="is not a run state"):
        snapshot.load_run_state(saved / "weights.safetensors")


def test_spec_json_is_the_whole_spec(saved):
    model, groups, masks = masked("plain")
    spec = adapters.find(model).spec(model, widths(groups, masks))
    again = ViTSpec.from_json(spec.to_json())
    assert json.loads(again.to_json()) == json.loads(spec.to_json())
    assert again.blocks == spec.blocks
