"""Formats of snapshots: what the version before wrote is read, what a later one writes is refused in a line."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import nvit
from nvit import adapters
from nvit.spec import FORMAT, ViTSpec
from nvit.structure import snapshot
from nvit.structure.manifest import write_manifest

OLDER = Path(__file__).parents[1] / "fixtures" / "snapshot_format_1"
"""A pruned Eva with rotary embedding, random weights, as nvit wrote it before spec.json said its format; never written
again. Its metrics hold what it answered."""


def answer(model: torch.nn.Module) -> torch.Tensor:
    size = adapters.preprocess(model)["input_size"]
    images = torch.linspace(-2, 2, 2 * size[0] * size[1] * size[2]).reshape(2, *size)
    with torch.no_grad():
        return model(images)


def written_later(folder: Path, file: str) -> None:
    """Have one file of a snapshot say that it is of a later format; the manifest fits it."""
    if file == "spec.json":
        spec = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(spec | {"format": FORMAT + 1, "depth_of_field": 3}))
        write_manifest(folder)
    else:
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))


def test_the_version_before_is_read_and_saved_again_in_this_one(tmp_path):
    assert "format" not in json.loads((OLDER / "spec.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nvit.load(OLDER)
    expected = torch.tensor(snapshot.load_metrics(OLDER)["logits"])
    torch.testing.assert_close(answer(model), expected, rtol=0, atol=1e-4)
    again = snapshot.save(tmp_path / "again", model)
    assert json.loads((again / "spec.json").read_text())["format"] == FORMAT
    assert snapshot.load_spec(again) == snapshot.load_spec(OLDER)
    torch.testing.assert_close(answer(nvit.load(again)), answer(model), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["spec.json", "manifest.json"])
def test_a_later_one_is_refused_in_a_line(file, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(nvit.BUNDLED, folder)
    written_later(folder, file)
    for read in (nvit.load, snapshot.load_spec):
        with pytest.raises(ValueError) as e:
            read(folder)
        said = f"{folder} was written by a newer nvit (format {FORMAT + 1}), this one reads up to {FORMAT}; upgrade"
        assert str(e.value).startswith(said) and "\n" not in str(e.value)


@pytest.mark.parametrize("found", [0, "2", None, 1.5, True])
def test_a_format_that_is_no_number_is_damage(found):
    spec = json.loads(snapshot.load_spec(nvit.BUNDLED).to_json())
    with pytest.raises(ValueError, match="its format is"):
        ViTSpec.from_json(json.dumps(spec | {"format": found}))


def test_the_bundled_snapshot_is_of_this_format_in_both_files():
    spec, manifest = (json.loads((nvit.BUNDLED / name).read_text()) for name in ("spec.json", "manifest.json"))
    assert spec["format"] == manifest["format"] == FORMAT
    assert (nvit.BUNDLED / "spec.json").read_text() == snapshot.load_spec(nvit.BUNDLED).to_json()
