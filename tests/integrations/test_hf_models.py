"""Pruned models of transformers go through its own saving and loading, exactly, without a network."""

import doctest
import json
import re
import socket
from pathlib import Path

import pytest
import torch

import nvit
from nvit import adapters
from nvit.adapters import hf_folder
from nvit.cli import main as cli
from nvit.spec import FORMAT
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from tests.families import hf
from tests.hosts import random_masks

transformers = pytest.importorskip("transformers", reason="pip install 'nvit[hf]'")
import nvit.hf  # noqa: E402

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parents[2]

BIRDS = {"id2label": {i: f"bird {i}" for i in range(7)}, "label2id": {f"bird {i}": i for i in range(7)}}


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("somebody calls out")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pruned(name="vit", keep=0.6, *, keep_output=False, **more):
    model = hf.make(name, **BIRDS | more)
    adapter = adapters.find(model)
    adapter.prepare(model)
    if keep_output:
        adapters.keep_output_(model)
    groups = adapter.groups(model)
    return compact(model, groups, random_masks(groups, keep)).eval()


def images_of(model):
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def answers(model, images):
    with torch.no_grad():
        return adapters.of(model).logits(model, images)


def assert_same(model, expected, images):
    for mine, theirs in zip(answers(model, images), answers(expected, images), strict=True):
        assert (mine is theirs is None) or torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned ViT with a mean of its own, and where it lies."""
    small = pruned()
    small.preprocess = {**small.preprocess, "mean": (0.1, 0.2, 0.3), "crop_mode": "center", "crop_pct": 0.5}
    return small, nvit.hf.save_pretrained(small, tmp_path_factory.mktemp("hf") / "small")


@pytest.mark.parametrize("name", [n for n in hf.MODELS if n != "dinov2_interpolated"])
def test_every_host_comes_back_exact_with_its_labels(name, tmp_path):
    small = pruned(name)
    images = images_of(small)
    path = nvit.hf.save_pretrained(small, tmp_path / "s")
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == f"nvit_{small.config.model_type}" and config["nvit"]["format"] == FORMAT
    cls = nvit.hf.CLASSES[type(small).__name__]
    again = cls.from_pretrained(path)
    assert isinstance(again, type(small)) and again.config.id2label[3] == "bird 3"
    assert list(again.state_dict()) == list(small.state_dict())
    assert_same(again, small, images)
    assert_same(nvit.load(path), small, images)
    assert type(nvit.load(path)) is type(small)


@pytest.mark.parametrize("name", hf.TOWERS)
def test_every_tower_comes_back_exact_narrow_or_with_its_width_restored(name, tmp_path):
    for keep_output in (False, True):
        if keep_output and name == "clip_tower":
            with pytest.raises(ValueError, match="take CLIPVisionModelWithProjection"):
                pruned(name, keep_output=True)
            continue
        small = pruned(name, keep_output=keep_output)
        path = nvit.hf.save_pretrained(small, tmp_path / f"s{keep_output}")
        said = json.loads((path / "config.json").read_text())["nvit"]
        assert said.get("keep_output") == (48 if keep_output and name != "clip_projected_tower" else None)
        mine = nvit.hf.CLASSES[type(small).__name__].from_pretrained(path)
        mine.save_pretrained(tmp_path / "again")
        expected = small(images_of(small))
        assert expected.last_hidden_state.shape[-1] == said.get("keep_output", said["blocks"][0]["emb"])
        for again in (mine, nvit.load(path), nvit.load(tmp_path / "again")):
            found = again(images_of(small))
            assert found.keys() == expected.keys() and isinstance(again, type(small))
            assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_classifier_s_tower_and_a_classifier_on_a_tower(name, tmp_path):
    """As transformers does with dense ones, weights by their names."""
    small = pruned(name)
    nvit.hf.save_pretrained(small, tmp_path / "classifier")
    tower = transformers.AutoModel.from_pretrained(tmp_path / "classifier")
    images, base = images_of(small), small.base_model_prefix
    expected = getattr(small, base)(images).last_hidden_state
    assert torch.equal(tower(images).last_hidden_state, expected)
    small = pruned(f"{name}_tower", keep_output=True)
    nvit.hf.save_pretrained(small, tmp_path / "tower")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "tower")
    assert torch.equal(getattr(model, base)(images).last_hidden_state, small(images).last_hidden_state)
    model.eval().save_pretrained(tmp_path / "c")
    assert torch.equal(nvit.load(tmp_path / "c")(images).logits, model(images).logits)


def test_weights_of_other_names_are_not_drawn_anew(tmp_path):
    nvit.hf.save_pretrained(pruned("clip_projected_tower"), tmp_path / "s")
    with pytest.raises(ValueError, match="have other names than those of a CLIPVisionModel; load it as NvitCLIP"):
        transformers.AutoModel.from_pretrained(tmp_path / "s")


def test_the_auto_classes_know_it(folder):
    small, path = folder
    again = transformers.AutoModelForImageClassification.from_pretrained(path)
    assert type(again).__name__ == "NvitViTForImageClassification"
    assert_same(again, small, images_of(small))
    teacher = nvit.hf.pretrained(pruned("deit_teacher")).config
    auto = transformers.AutoModelForImageClassification.from_config(teacher)
    assert isinstance(auto, transformers.DeiTForImageClassificationWithTeacher), "of two that share a config"
    other = transformers.AutoModelForImageClassification.from_pretrained(
        path, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    assert other.classifier.weight.shape == (3, small.classifier.weight.shape[1])
    assert other.dtype == torch.bfloat16


def test_the_processor_prepares_images_as_the_model_says(folder):
    small, path = folder
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    flat = torch.full((3, 50, 70), 255, dtype=torch.uint8)
    made = processor(flat, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(small.preprocess[k]) for k in ("mean", "std"))
    assert made.shape == (1, 3, 16, 16)
    torch.testing.assert_close(made.mean((0, 2, 3)), (1 - mean) / std)
    assert adapters.preprocess(nvit.load(path)) == adapters.preprocess(small)


@pytest.mark.parametrize(("mode", "fraction"), [("center", 0.875), ("squash", 1.0), ("squash", 0.875), ("center", 1.0)])
def test_processor_files_say_what_they_are_read_as(mode, fraction):
    images = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    images |= {"crop_pct": fraction, "crop_mode": mode}
    assert hf_folder.of_processor(hf_folder.to_processor(images)) == images
    with pytest.raises(ValueError, match="give a processor of your own"):
        hf_folder.to_processor(images | {"interpolation": "random"})


def test_what_was_loaded_trains_saves_and_prunes_again(folder, tmp_path):
    _, path = folder
    model = transformers.AutoModelForImageClassification.from_pretrained(path)
    model(images_of(model), labels=torch.tensor([1, 2])).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().save_pretrained(tmp_path / "trained")
    images = images_of(model)
    assert_same(nvit.load(tmp_path / "trained"), model, images)
    groups = adapters.of(model).groups(model)
    smaller = compact(model, groups, random_masks(groups, 0.7)).eval()
    smaller.save_pretrained(tmp_path / "smaller", max_shard_size="20KB")
    assert (tmp_path / "smaller" / "model.safetensors.index.json").is_file()
    again = nvit.load(tmp_path / "smaller")
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same(again, smaller, images)
    assert_same(nvit.load(snapshot.save(tmp_path / "snapshot", smaller)), smaller, images)


def test_a_masked_model_is_made_compact_and_others_are_refused(tmp_path):
    model = hf.make("vit")
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    masks = random_masks(groups, 0.5)
    apply_(model, groups, masks)
    twin = nvit.hf.pretrained(model)
    assert twin.vit.layernorm.weight.numel() == int(masks["emb"].sum())
    torch.testing.assert_close(answers(twin, images_of(model))[0], answers(model, images_of(model))[0])
    with pytest.raises(ValueError, match="VisionTransformer is no model of transformers; save it"):
        nvit.hf.pretrained(nvit.load(nvit.BUNDLED))


def test_commands_take_the_folder(folder, tmp_path, capsys):
    _, path = folder
    said = ["compare", str(path), "--seconds", "0.1", "--table", "analytic", "--latency-batch", "2", "--device", "cpu"]
    assert cli.main([*said, "--out", str(tmp_path / "c")]) == 0
    (row,) = json.loads((tmp_path / "c" / "result.json").read_text())["models"]
    assert row["params"] == sum(p.numel() for p in nvit.load(path).parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["nvit"].update(format=FORMAT + 1), f"was written by a newer nvit (format {FORMAT + 1}), this one"),
        (lambda c: c.update(nvit=[1]), "nvit is a list, expected an object"),
        (lambda c: c["nvit"]["blocks"][0].update(mlp=57), "model.safetensors does not fit config.json"),
        (lambda c: c["nvit"]["blocks"].pop(), "config.json is damaged or from another version: it lists 1 blocks"),
    ],
)
def test_a_wrong_config_is_one_line(change, says, folder, tmp_path):
    config = json.loads((folder[1] / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder[1] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError) as e:
        nvit.load(tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["pretrained", "save_pretrained"])
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"nvit": nvit, "transformers": transformers}
    example = doctest.DocTestParser().get_doctest(getattr(nvit.hf, name).__doc__, given, name, None, None)
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.attempted and not result.failed, "".join(said)


def test_the_page_s_code_runs(tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(), re.S)[0]
    monkeypatch.chdir(tmp_path)
    small = pruned()
    snapshot.save("vit_0.5", small)
    found: dict = {}
    exec(code, found)
    assert_same(found["again"], small, images_of(small))
    assert found["processor"].crop_size["height"] == 16
