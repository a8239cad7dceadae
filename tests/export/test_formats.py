"""Every family in every format: the files of compact models, opened by their own runtimes, against the models."""

import shutil
from pathlib import Path

import pytest
import torch

from nvit import adapters
from nvit.export import aoti, check, onnx_file, to_onnx
from nvit.export import export as export_module
from nvit.export.export import export, seeded_images
from nvit.export.program import exportable, read
from nvit.export.registry import FORMATS, REFUSED, formats
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from tests.families import HOSTS
from tests.hosts import random_masks

pytestmark = pytest.mark.usefixtures("torchlib_once")

FILES = ("torch", "onnx", "openvino")
FAMILIES = [
    name
    for name in ("vit_deit_distilled", "swin_shifted", "eva_rope_mixed_ape", "beit_both", "hf_dinov2_registers")
    if name in HOSTS
]
"""One of each, small: what a conversion takes grows with the graph."""
KINDS = [
    "vit_qk_norm",
    "vit_attention_pooling",
    "swin_padded",
    "eva_perception_core",
    "eva_dinov3",
    "beit_swiglu",
    "hf_vit",
]
"""Hosts whose graphs differ from those of `FAMILIES`."""


def pruned(host):
    """A compact model, of odd widths."""
    model = HOSTS[host]()
    model = adapters.find(model).prepare(model)
    groups = adapters.find(model).groups(model)
    return compact(model, groups, random_masks(groups)).eval()


def assert_same(form, path, model, batch, dtype=torch.float32, tolerance=1e-4):
    images = torch.randn(batch, *adapters.preprocess(model)["input_size"]).to(dtype)
    with torch.no_grad():
        expected, found = adapters.predict(model, images), FORMATS[form].open(Path(path))(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("host", FAMILIES)
def test_every_family_in_every_format(host, tmp_path):
    model = pruned(host)
    for file in export(model, tmp_path, FILES):
        for batch in (1, 5):
            assert_same(file.format, file.path, model, batch)
        assert file.difference <= 1e-4 and file.batches == (1, 3)


@pytest.mark.parametrize("host", KINDS)
def test_no_kind_of_model_fixes_the_batch(host):
    model = pruned(host)
    copied = exportable(model)
    program = read(copied, seeded_images(model, 2)).module()
    for batch in (1, 4):
        images = seeded_images(model, batch)
        torch.testing.assert_close(program(images), copied(images), rtol=0, atol=1e-6)


@pytest.mark.long
def test_aot_inductor(tmp_path):
    model = pruned("vit_deit_distilled")
    [file] = export(model, tmp_path, ["aoti"])
    assert_same("aoti", file.path, model, 2)
    assert file.files == ("model.aoti.pt2",)


def test_a_static_batch_halves_and_data_outside(tmp_path):
    model = pruned("vit_deit_distilled")
    [file] = export(model, tmp_path, ["onnx"], static=2, dtype="float16", opset=18, external_bytes=1000)
    assert set(file.files) == {"model.onnx", "model.onnx.data"} and file.batches == (2,)
    assert {p.name for p in tmp_path.iterdir()} == set(file.files)
    assert (tmp_path / "model.onnx.data").stat().st_size > 20_000
    assert_same("onnx", file.path, model.half(), 2, torch.float16, 1e-2)
    with pytest.raises(Exception, match=r"(?i)invalid dimension|got invalid"):
        onnx_file.OnnxFile().open(Path(file.path))(seeded_images(model, 3).half())
    import onnx

    assert onnx.load(file.path, load_external_data=False).opset_import[0].version == 18


def test_sparse_weights_survive(tmp_path):
    import onnx

    from nvit import sparse24

    model = pruned("vit_deit_distilled")
    masks = sparse24.masks_2to4(model)
    sparse24.apply_masks_(model, masks)
    export(model, tmp_path, ["onnx"])
    stored = [torch.tensor(onnx.numpy_helper.to_array(t)) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    for name in masks:
        weight = model.get_parameter(name.removesuffix(".weight") + ".weight").detach()
        same = [t for t in stored if any(t.shape == w.shape and torch.equal(t, w) for w in (weight, weight.T))]
        assert same and float((same[0] == 0).float().mean()) >= 0.5, name


def test_what_differs_is_not_written(tmp_path, monkeypatch):
    model = pruned("vit_deit_distilled")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt2").write_text("before")
    monkeypatch.setattr(check, "FULL", -1.0)
    with pytest.raises(ValueError, match=r"model.pt2 computes something else on 1 images: .* nothing is written"):
        export(model, tmp_path / "out", ["torch"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.pt2").read_text() == "before"


def test_a_file_that_does_not_run_and_too_few_images_are_named(tmp_path, monkeypatch):
    model = pruned("vit_deit_distilled")
    with pytest.raises(ValueError, match=r"2 images are too few .* 4 are needed"):
        export(model, tmp_path, ["torch"], images=seeded_images(model, 2))
    monkeypatch.setattr(check, "BATCHES", (2, 3))
    monkeypatch.setattr(export_module, "BATCHES", (2, 3))

    def fixed(model, images, static):
        return torch.export.export(model, (images,))

    monkeypatch.setattr(export_module, "read", fixed)
    with pytest.raises(ValueError, match=r"model.pt2 does not run on 2 images"):
        export(model, tmp_path, ["torch"])


def test_masked_and_compressed_models_are_refused(tmp_path):
    model = HOSTS["vit_deit_distilled"]()
    model = adapters.find(model).prepare(model)
    groups = adapters.find(model).groups(model)
    apply_(model, groups, random_masks(groups))
    with pytest.raises(ValueError, match=r"the model is masked \(.*pruner.compact"):
        export(model, tmp_path, ["torch"])
    whole = pruned("vit_deit_distilled")
    whole.blocks[0].mlp.fc1.weight = torch.nn.Parameter(whole.blocks[0].mlp.fc1.weight.detach().to_sparse(), False)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.weight is a sparse tensor.* sparse=False"):
        export(whole, tmp_path, ["torch"])


@pytest.mark.parametrize("name", REFUSED)
def test_some_formats_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"format {name} is refused: .*--format torch"):
        formats([name])


def test_what_is_missing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("nvit.export.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"format openvino needs .*pip install 'nvit\[export\]'"):
        formats(["openvino"])
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in aoti.AotInductor().refusal()
    with pytest.raises(ValueError, match="format aoti: no C"):
        formats(["aoti"])
    for wrong, said in ((["onx"], "unknown; expected one of torch"), ([], "no format"), (["onnx"] * 2, "named twice")):
        with pytest.raises(ValueError, match=said):
            formats(wrong)
    with pytest.raises(ValueError, match="onnx has no bfloat16 here; expected one of float32, float16"):
        export(pruned("vit_deit_distilled"), tmp_path, ["onnx"], dtype="bfloat16")
    with pytest.raises(ValueError, match="opset 11 is not written; expected 18"):
        to_onnx.to_onnx(None, (), 11, [], [])
