"""Every method of the contest at toy size: to its latency, trained alike, kept; and images that are augmented on the
device."""

import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch

import nvit
from benchmarks.accuracy import contest, contest_figure, shapes, tiny_imagenet
from benchmarks.accuracy.rows import Resumed, rows_of
from benchmarks.accuracy.tiny_imagenet import Batches, Images
from nvit.spec import BlockWidths

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


@pytest.fixture(scope="module")
def toy(images, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    rows = Resumed("curve", contest.KEY, folder=work)
    nvit.LatencyTable.analytic(host()).save(work / "latency_table.json")  # what is there is not measured
    return contest.Contest(TOY, host, images, images, work, rows)


METHODS = [m for m in contest.METHODS if "Torch" not in m or importlib.util.find_spec("torch_pruning")]


def test_every_method_is_trained_alike_and_kept(toy, monkeypatch):
    dense_macs = float(toy.rows.rows[0]["macs"])
    for method in METHODS:
        toy.run(method)
    found = {r["method"]: r for r in rows_of(toy.work / "curve_cpu.csv")}
    assert list(found) == ["dense", *METHODS]
    for method in METHODS:
        row, small = found[method], nvit.load(toy.work / f"{method}-0.7")
        assert 0.4 * dense_macs < float(row["macs"]) < 0.95 * dense_macs and row["trained_on"] == "32", method
        x = toy.calibration().ready(toy.val.pixels)
        assert 100 * float((small(x).argmax(-1) == toy.val.labels).float().mean()) == pytest.approx(float(row["top1"]))
    contest.compare(toy.rows)
    ours = next(r for r in rows_of(toy.work / "curve_cpu.csv") if r["method"] == contest.OURS[0])
    best = max((r for m, r in found.items() if m in contest.PEERS), key=lambda r: float(r["top1"]))
    assert float(ours["ahead"]) == pytest.approx(float(ours["top1"]) - float(best["top1"]), abs=0.01)
    path = toy.work / "curve.png"
    contest_figure.plot(rows_of(toy.work / "curve_cpu.csv"), path, "toy")
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(contest.Contest, "trained", None)
    for method in METHODS:  # what there is a row of is not done again
        toy.run(method)


def test_widths_of_a_family_shrink_from_the_dense_model_on():
    dense = (BlockWidths(192, 3, 64, 64, 768),) * 4
    every = shapes.family("uniform", dense)
    assert every[0] == dense and every[40][0] == BlockWidths(112, 3, 40, 40, 464)
    first, middle = shapes.ruled(dense, 128)[:2]
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
    path = Path(tmp_path / tiny_imagenet.PACK)
    tiny_imagenet.pack(tmp_path / "images", path)
    found = tiny_imagenet.read(path)["val"]
    assert found.classes == ("n01", "n02") and found.labels.tolist() == [0, 0, 1, 1]
    assert (found.pixels[3].float().mean((1, 2)) - torch.tensor([60.0, 9, 100])).abs().max() < 4
    assert torch.equal(found.some(2).pixels, found.pixels[[0, 2]])
    assert torch.equal(found.last(2).pixels, found.pixels[[1, 3]])
    with pytest.raises(ValueError, match="1 images are less than one of each of 2 classes"):
        found.some(1)


def test_deit_tiny_takes_its_heads_rows(tmp_path):
    from safetensors.torch import save_file

    names = [f"n{i:04d}" for i in range(1000)]
    (tmp_path / "synsets.txt").write_text("\n".join(names))
    dense = timm.create_model("deit_tiny_patch16_224")
    save_file({k: v.half() for k, v in dense.state_dict().items()}, tmp_path / "w.safetensors")
    small = tiny_imagenet.deit_tiny(tmp_path / "w.safetensors", ("n0007", "n0003"), tmp_path / "synsets.txt", 224)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        # The weights are rounded to 16 bits.
        torch.testing.assert_close(small(x), dense.eval()(x)[:, [7, 3]], rtol=0, atol=5e-3)
