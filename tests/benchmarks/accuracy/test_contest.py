"""Every method of the contest at toy size: to its latency, trained alike, kept; and images that are augmented on the
device."""

import copy
import dataclasses
import time

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import nvit
from benchmarks.accuracy import contest, contest_figure, gpu_evidence, shapes, tiny_imagenet
from benchmarks.accuracy.rows import Resumed, rows_of
from benchmarks.accuracy.tiny_imagenet import Batches, Images
from nvit.spec import BlockWidths
from tests.fake_device import FAKE, FakeDevice, known_to_torch

TOY = contest.Scale(
    size=32,
    targets=(0.7,),
    dense_images=32,
    images=32,
    pruning_images=16,
    batch_size=4,
    calibration=16,
    amp="no",
    latency_batch=2,
    seconds=0.0,
)


def host():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=2, num_classes=4)


@pytest.fixture(scope="module")
def images():
    """Four classes that differ in colour."""
    draws = np.random.default_rng(0)
    labels = torch.arange(4).repeat_interleave(8)
    pixels = torch.from_numpy(draws.integers(0, 90, (32, 3, 64, 64), dtype=np.uint8))
    for i, c in enumerate(labels):
        pixels[i, c % 3] += 50 * (1 + int(c) // 3)
    return Images(pixels, labels, tuple("abcd"))


METHODS = [m for m in (*gpu_evidence.CHOSEN, "magnitude") if contest.needed([m]) == ""]
"""One of each kind: the others differ by an option."""


@pytest.fixture(scope="module")
def toy(images, tmp_path_factory):
    """What the GPU's command leaves of a toy on a CPU, and the methods that it leaves out."""
    work = tmp_path_factory.mktemp("work")
    rows = Resumed("curve", contest.KEY, folder=work)
    nvit.LatencyTable.analytic(host()).save(work / "latency_table.json")  # what is there is not measured
    chosen = tuple(m for m in gpu_evidence.CHOSEN if m in METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_evidence, "rate", lambda *_: 0.01)  # images a second, so that the least are trained on
        scale = dataclasses.replace(TOY, images=0)  # as the seconds say
        mine, well = gpu_evidence.evidence(
            lambda scale: contest.Contest(scale, host, images, images, images, work, rows), scale, 1000.0, chosen
        )
    assert well
    for method in METHODS:
        mine.run(method)
    contest.compare(rows)
    return mine


def test_every_method_is_trained_alike_and_kept(toy, monkeypatch):
    found = {r["method"]: r for r in rows_of(toy.work / "curve_cpu.csv")}
    assert set(found) == {"dense", *METHODS}
    for method in METHODS:
        row, small = found[method], nvit.load(toy.work / f"{method}-0.7")
        assert 0.4 < float(row["macs"]) / float(found["dense"]["macs"]) < 0.95 and row["trained_on"] == "16", method
        x = toy.calibration().ready(toy.val.pixels)
        assert 100 * float((small(x).argmax(-1) == toy.val.labels).float().mean()) == pytest.approx(float(row["top1"]))
    best = max((r for m, r in found.items() if m in contest.PEERS), key=lambda r: float(r["top1"]))
    for method in contest.OURS:
        ahead = float(found[method]["top1"]) - float(best["top1"])
        assert float(found[method]["ahead"]) == pytest.approx(ahead, abs=0.01)
    contest_figure.plot(list(found.values()), toy.work / "curve.png", "toy")
    assert (toy.work / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(contest.Contest, "best", None)
    for method in METHODS:  # what there is a row of is not done again
        toy.run(method)


def test_a_model_that_was_pruned_is_not_pruned_again_and_takes_its_better_rate(toy, monkeypatch):
    toy.rows.rows = [r for r in toy.rows.rows if r["method"] != "uniform"]
    monkeypatch.setitem(contest.METHODS, "uniform", None)
    knows = {1e-4: 0.25, 3e-4: 0.5}
    monkeypatch.setattr(contest.Contest, "trained", lambda self, model, images, lr, teacher: model.eval())
    asked, right = iter(knows.values()), contest.Contest.right

    def answers(self, model, images=None):
        return torch.tensor([next(asked)]) if images is toy.held else right(self, model, images)

    monkeypatch.setattr(contest.Contest, "right", answers)
    toy.held = Images(toy.val.pixels, toy.val.labels, toy.val.classes)
    toy.run("uniform")
    assert toy.rows.find(target=0.7, method="uniform")["lr"] == 3e-4


@pytest.mark.long
def test_nothing_of_a_contest_is_left_on_another_device(images, tmp_path, monkeypatch):
    """Every way to narrow a model, trained and measured on a device that refuses tensors of the CPU's."""
    known_to_torch(monkeypatch)
    monkeypatch.setattr(Accelerator, "device", FAKE)
    load, save = nvit.load, nvit.snapshot.save  # files know no such device
    monkeypatch.setattr(nvit, "load", lambda path, device: load(path).to(device))
    monkeypatch.setattr(nvit.snapshot, "save", lambda path, model, *a: save(path, copy.deepcopy(model).cpu(), *a))
    nvit.LatencyTable.analytic(host()).save(tmp_path / "latency_table.json")
    scale, rows = dataclasses.replace(TOY, rates=(1e-4,)), Resumed("curve", contest.KEY, folder=tmp_path)
    with FakeDevice():
        there = images.to(FAKE)
        make = lambda scale: contest.Contest(scale, host, there, there, there, tmp_path, rows)  # noqa: E731
        chosen = [m for m in METHODS if m not in ("magnitude", "ReViT-shaped")]
        assert gpu_evidence.evidence(make, scale, 1000.0, chosen)[1], [r.get("failed") for r in rows.rows]


def test_seconds_say_how_many_images_and_late_methods_are_left_out(toy, monkeypatch, capsys):
    before = copy.deepcopy(toy.dense.state_dict())
    assert gpu_evidence.rate(toy, toy.dense, batches=1) > 0
    assert all(torch.equal(t, before[name]) for name, t in toy.dense.state_dict().items())
    monkeypatch.setattr(gpu_evidence, "rate", lambda *_: 5.0)
    assert gpu_evidence.allotted(toy, 1e6, gpu_evidence.CHOSEN) == 16, "what a run was given stays"
    (toy.work / "images.txt").unlink()
    spent = 5 * gpu_evidence.APART + toy.scale.decisions * gpu_evidence.DECISION
    end = time.monotonic() + (spent + 101) / gpu_evidence.MARGIN
    with monkeypatch.context() as patch:
        patch.setattr(contest.Contest, "made", lambda self, method: {})  # Torch-Pruning may not be here
        images = gpu_evidence.allotted(toy, end, gpu_evidence.CHOSEN)
    assert images == 48  # 5 images/s for 10 s with each of two rates, in batches
    assert gpu_evidence.evidence(lambda scale: toy, TOY, -1.0, ("uniform", "magnitude"))[1]
    assert "magnitude: left out" in capsys.readouterr().err


def test_a_method_that_fails_says_so_in_its_row_and_others_go_on(toy, monkeypatch, capsys):
    toy.rows.rows = [r for r in toy.rows.rows if r["method"] != "random"]
    broken = monkeypatch.context
    with broken() as patch:
        patch.setitem(contest.METHODS, "random", lambda mine: 1 / 0)
        assert not gpu_evidence.evidence(lambda scale: toy, toy.scale, 1000.0, ("random", "magnitude"))[1]
    (row,) = (r for r in rows_of(toy.work / "curve_cpu.csv") if r["method"] == "random")
    assert row["failed"] == "ZeroDivisionError: division by zero" and not row["top1"]
    assert "random: failed" in capsys.readouterr().err and toy.rows.find(target=0.7, method="magnitude")["top1"]
    contest_figure.plot(toy.rows.rows, toy.work / "without.png", "toy")
    with broken() as patch:  # and is tried again
        patch.setattr(contest.Contest, "run", contest.Contest.made)
        assert gpu_evidence.evidence(lambda scale: toy, toy.scale, 1000.0, ("random",))[1]
    toy.rows.rows = [r for r in toy.rows.rows if r["method"] != "random"]


def test_a_peer_that_is_missing_is_named_first(monkeypatch):
    monkeypatch.setattr(contest, "find_spec", lambda name: None)
    assert contest.needed(contest.METHODS) == "Torch-Pruning is not installed; pip install 'nvit[bench]'"
    assert contest.needed(["uniform"]) == ""


def test_widths_of_a_family_shrink_from_the_dense_model_on():
    dense = (BlockWidths(192, 3, 64, 64, 768),) * 4
    every = shapes.family("uniform", dense)
    assert every[0] == dense and every[40][0] == BlockWidths(112, 3, 40, 40, 464)
    first, middle = shapes.ruled(dense, 128)[:2]
    assert shapes.uniform(dense, 0.7)[0].qk_dim == 44 and shapes.uniform(dense, 0.7, shapes.ALIGNED)[0].qk_dim == 48
    # Half of the heads, query/key dims and hidden units outside of the middle; never wider than the model.
    assert (first, middle) == (BlockWidths(128, 2, 8, 64, 384), BlockWidths(128, 2, 16, 64, 768))
    assert shapes.ruled(dense, 192)[1] == BlockWidths(192, 3, 16, 64, 768)


def test_batches_are_the_same_at_the_same_seed_and_move_little(images):
    def first(augment):
        torch.manual_seed(3)
        return next(iter(Batches(images, 64, 8, training=True, augment=augment)))

    (moved, labels), (again, _), (still, same) = first(True), first(True), first(False)
    assert torch.equal(moved, again) and torch.equal(labels, same) and not torch.equal(moved, still)
    # A crop of an image keeps its colours, but for the edge that is repeated.
    assert (moved.mean((2, 3)) - still.mean((2, 3))).abs().max() < 0.1
    batches = Batches(images, 64, 5, training=False)
    assert [len(y) for _, y in batches] == [5] * 6 + [2] and len(batches) == 7
    torch.testing.assert_close(batches.ready(images.pixels)[3, 0] * 0.229 + 0.485, images.pixels[3, 0] / 255)


def test_a_packed_folder_reads_back(tmp_path):
    for split in tiny_imagenet.SPLITS:
        for c, name in enumerate(("n01", "n02")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                PIL.Image.new("RGB", (64, 64), (60 * c, 9, 100 * i)).save(folder / f"{i}.jpg", quality=95)
    (tmp_path / "images").rename(tmp_path / "tiny_imagenet200")
    path = tiny_imagenet.packed(tmp_path, tmp_path / "work")
    assert tiny_imagenet.packed(path.parent, tmp_path) == path, "one that is there is not written again"
    found = tiny_imagenet.read(path)["val"]
    assert found.classes == ("n01", "n02") and found.labels.tolist() == [0, 0, 1, 1]
    assert (found.pixels[3].float().mean((1, 2)) - torch.tensor([60.0, 9, 100])).abs().max() < 4
    assert torch.equal(found.some(2).pixels, found.pixels[[0, 2]])
    assert torch.equal(found.last(2).pixels, found.pixels[[1, 3]])
    with pytest.raises(ValueError, match="1 images are less than one of each of 2 classes"):
        found.some(1)


def test_what_travels_is_deit_tiny_in_16_bits(tmp_path, monkeypatch):
    """And its head's rows of the classes, as the images number them."""
    names, there = [f"n{i:04d}" for i in range(1000)], tmp_path / "there"
    (tmp_path / tiny_imagenet.SYNSETS).write_text("\n".join(names))
    (tmp_path / tiny_imagenet.PACK).write_bytes(b"images")
    dense = timm.create_model(tiny_imagenet.MODEL).eval()
    save_file(dense.state_dict(), tmp_path / tiny_imagenet.WEIGHTS)
    sent = tiny_imagenet.luggage(tmp_path, there)
    assert sent == sum(p.stat().st_size for p in there.iterdir()) < 12 << 20
    small = tiny_imagenet.deit_tiny(there, ("n0007", "n0003"), 224)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(small(x), dense(x)[:, [7, 3]], rtol=0, atol=5e-3)  # rounded to 16 bits
    monkeypatch.setattr(tiny_imagenet, "MOST", sent)
    with pytest.raises(ValueError, match="may travel; leave wheels out"):
        tiny_imagenet.luggage(tmp_path, there)
