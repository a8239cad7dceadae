"""Every file is counted: read, skipped by type, or broken by name; a split is what it says."""

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from nvit.training.folders import (
    BrokenImage,
    ImageFiles,
    find_broken,
    open_image,
    scan,
    split_folder,
)


def picture(path, value=90, size=6, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if mode == "L" else (size, size, len(mode))
    Image.fromarray(np.full(shape, value, np.uint8), mode).save(path)
    return path


def test_all_image_types_are_read_and_others_are_counted(tmp_path):
    for i, suffix in enumerate(("png", "webp", "bmp", "tif", "jpg", "JPEG", "gif", "ppm")):
        picture(tmp_path / "a" / f"{i}.{suffix}")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / ".hidden").write_text("x")
    found = scan(tmp_path)
    assert len(found.files) == 8 and found.skipped == {".txt": 1}
    data = ImageFiles(found, {"a": 0})
    assert [data[i][0].mode for i in range(len(data))] == ["RGB"] * 8
    assert "8 images of 1 classes" in data.summary() and "1 × .txt" in data.summary()


def test_files_come_in_natural_order(tmp_path):
    for name in ("10", "9", "1"):
        picture(tmp_path / "c" / f"{name}.png")
    assert [p.stem for p, _ in scan(tmp_path).files] == ["1", "9", "10"]


def test_folders_of_one_name_are_not_merged(tmp_path):
    picture(tmp_path / "cat" / "a" / "1.png")
    picture(tmp_path / "dog" / "a" / "1.png")
    with pytest.raises(ValueError, match=r"cat/a and .*dog/a are both called 'a'"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["train", "val"], "train", "train"),
        (["train", "val"], "validation", "val"),
        (["Train", "Val"], "train", "Train"),
        (["Train", "Val"], "validation", "Val"),
        (["train"], "validation", None),
        (["train", "test"], "validation", None),
        (["cat", "dog"], "train", ""),
        (["cat", "dog"], "validation", ""),
    ],
)
def test_a_split_is_what_it_says(tmp_path, folders, split, expected):
    for name in folders:
        picture(tmp_path / name / "1.png")
    assert split_folder(tmp_path, split) == (None if expected is None else tmp_path / expected)


@pytest.mark.parametrize("folders", [["val"], ["test"], ["val", "test"]])
def test_what_is_not_for_training_is_never_trained_on(tmp_path, folders):
    for name in folders:
        picture(tmp_path / name / "a" / "1.png")
    with pytest.raises(ValueError, match="no train/"):
        split_folder(tmp_path, "train")


def test_two_folders_for_one_split_are_refused(tmp_path):
    for name in ("val", "validation"):
        picture(tmp_path / name / "a" / "1.png")
    with pytest.raises(ValueError, match="both claim to be the validation images"):
        split_folder(tmp_path, "train")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    got = np.asarray(open_image(tmp_path / "deep.png", "RGB"))[..., 0].astype(int)
    assert np.abs(got - deep.astype(int) // 257).max() <= 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_follow_the_model(tmp_path, channels, mode):
    picture(tmp_path / "a" / "1.png")
    assert ImageFiles(scan(tmp_path), {"a": 0}, channels=channels)[0][0].mode == mode


def test_channels_that_no_file_has_are_refused(tmp_path):
    picture(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match="takes 5 channels"):
        ImageFiles(scan(tmp_path), {"a": 0}, channels=5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named_in_one_line(tmp_path, workers):
    picture(tmp_path / "a" / "1.png")
    whole = picture(tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    loader = DataLoader(ImageFiles(scan(tmp_path), {"a": 0}), batch_size=1, num_workers=workers, collate_fn=list)
    with pytest.raises(BrokenImage) as e:
        list(loader)
    assert "2.png cannot be read as an image" in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).startswith(str(tmp_path))


def test_broken_files_can_be_left_out_and_are_counted(tmp_path):
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    found = scan(tmp_path)
    data = ImageFiles(found, {"a": 0}, broken=find_broken(found))
    assert len(data) == 2 and "1 broken left out" in data.summary() and "1.png" in data.summary()


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"no images found; .*1 × .csv"):
        scan(tmp_path)
