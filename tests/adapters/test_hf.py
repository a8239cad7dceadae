"""Hugging Face models: what comes back is theirs, folders they save open from the command line, errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nvit
from nvit import adapters
from nvit.adapters import hf_folder, hf_hosts
from nvit.cli import main as cli
from nvit.cli.flags import ModelFlags
from nvit.cli.models import open_model
from nvit.structure import snapshot
from nvit.structure.compact import compact
from tests.cli.test_cli import folder_of_images
from tests.families import hf
from tests.hosts import random_masks

transformers = pytest.importorskip("transformers", reason="pip install 'nvit[hf]'")
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parents[2]
HF = adapters.FAMILIES["hf_vit"]
QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "2", "--device", "cpu")


def x_of(model, batch=2):
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


def pruned(name, keep=0.6, **more):
    """The model as it was, and a compact one."""
    model = hf.make(name, **more)
    groups = HF.groups(HF.prepare(model))
    return model, compact(model, groups, random_masks(groups, keep)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved DINOv2 of 5 classes with the file of its image processor."""
    path = tmp_path_factory.mktemp("hf") / "my_dinov2"
    hf.make("dinov2", num_labels=5, image_size=56).save_pretrained(path)
    processor = {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}}
    processor |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    (path / hf_folder.PROCESSOR).write_text(json.dumps(processor))
    return path


@pytest.mark.parametrize("name", ["vit", "deit", "deit_teacher", "dinov2", "dinov2_registers"])
def test_a_snapshot_reloads_as_the_class_it_was(name, tmp_path):
    model, small = pruned(name, id2label={i: f"bird {i}" for i in range(7)}, label2id={})
    again = nvit.load(snapshot.save(tmp_path / "s", small))
    assert type(again) is type(model) and not again.training
    x = x_of(again)
    with torch.inference_mode():
        out, expected = again(pixel_values=x), small(pixel_values=x)
    assert isinstance(out, transformers.utils.ModelOutput)
    for key in expected:
        torch.testing.assert_close(out[key], expected[key])
    assert again.config.id2label[3] == "bird 3"
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_two_classifiers_give_two_logits_and_their_mean():
    model, small = pruned("deit_teacher")
    x = x_of(model)
    with torch.no_grad():
        out, logits = small(x), HF.logits(small, x)
        torch.testing.assert_close(logits.mean, out.logits)
        torch.testing.assert_close(adapters.predict(small, x), out.logits)
    assert not torch.allclose(logits.cls, logits.dist)


def test_hidden_states_are_the_kept_stream_and_attention_weights_are_refused():
    model, small = pruned("vit")
    width = small.vit.layernorm.weight.numel()
    assert width < 48
    states = small(x_of(model), output_hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in states] == [(2, 5, width)] * 3
    with pytest.raises(ValueError, match="leave out output_attentions"):
        small(x_of(model), output_attentions=True)


def test_their_loss_reaches_every_weight():
    model, small = pruned("dinov2", use_mask_token=False)
    small(x_of(model), labels=torch.tensor([1, 4])).loss.backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_masks_go_on_working(implementation):
    plain = hf.make("vit")
    plain.set_attn_implementation(implementation)
    x, keep = x_of(plain), torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected, unmasked = plain(x, attention_mask=keep).logits, plain(x).logits
        got = HF.prepare(plain)(x, attention_mask=keep).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, unmasked)


def test_a_measured_table_holds_all_parts():
    model = hf.make("dinov2_registers")
    table = nvit.LatencyTable.measure(model, 2, seconds=0.3)
    assert {p.name for p in table.parts} == {"attention", "mlp", "rest"} and table.dense_ms > 0
    assert not hasattr(model, "dense_config"), "the model is left as it is"
    assert table.setting.tokens == 1 + 3 + 4


def test_preprocessing_is_the_architecture_s_unless_the_model_says_otherwise():
    vit, dino = hf.make("vit"), hf.make("dinov2")
    assert adapters.preprocess(vit)["mean"] == (0.5, 0.5, 0.5) and adapters.preprocess(vit)["crop_mode"] == "squash"
    assert adapters.preprocess(hf.make("deit"))["mean"] == adapters.preprocess(dino)["mean"] == (0.485, 0.456, 0.406)
    assert adapters.preprocess(hf.make("vit_one_channel"))["mean"] == (0.5,)
    vit.preprocess = {"mean": [0.1, 0.2, 0.3], "input_size": (3, 99, 99)}
    assert adapters.preprocess(vit)["mean"] == (0.1, 0.2, 0.3)
    assert adapters.preprocess(vit)["input_size"] == (3, 16, 16), "a ViT takes one size"
    dino.preprocess = {"input_size": (3, 42, 56)}
    assert adapters.find(dino).tokens(dino) == 1 + 3 * 4


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (transformers.ViTImageProcessor(), ((3, 224, 224), "squash", 1.0, "bilinear", 0.5)),
        (transformers.DeiTImageProcessor(), ((3, 224, 224), "squash", 0.875, "bicubic", 0.5)),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 256}, image_mean=[0.4, 0.5, 0.6]),
            ((3, 224, 224), "center", 0.875, "bicubic", 0.4),
        ),
    ],
    ids=["vit", "deit", "bit"],
)
def test_image_processors_are_read(processor, expected):
    found = hf_folder.of_processor(processor.to_dict())
    keys = ("input_size", "crop_mode", "crop_pct", "interpolation")
    assert (*(found[k] for k in keys), found["mean"][0]) == expected


def test_a_folder_opens_with_its_weights_and_its_images(folder):
    model, there = hf_folder.open_folder(folder), transformers.Dinov2ForImageClassification.from_pretrained(folder)
    x = x_of(model)
    assert x.shape[1:] == (3, 28, 28), "the processor's size, not the config's 56"
    torch.testing.assert_close(model(x).logits, there(x).logits)
    found = adapters.preprocess(model)
    assert found["mean"] == (0.4, 0.5, 0.6) and found["interpolation"] == "bilinear" and found["crop_pct"] == 28 / 32
    fresh = open_model(str(folder), ModelFlags(pretrained=False), torch.device("cpu"))
    assert not torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_the_command_line_prunes_a_folder(folder, tmp_path, capsys):
    data = folder_of_images(tmp_path / "data", 5)
    shown = ["--data", str(data), "--eval-data", str(data), "--accept-labels"]  # random weights know no labels
    run = ["prune", "--model", str(folder), *shown, "--out", str(tmp_path / "run"), "--bundle-heads", "1"]
    assert cli.main([*run, "--no-train", "--finetune-epochs", "1", "--batch-size", "4", "--mixup", "0.2", *QUICK]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = result["snapshots"]
    assert row["predicted_ratio"] <= 0.5 and 0 <= row["top1"] <= 100 and row["macs"] < result["dense"]["macs"]
    small = nvit.load(row["path"])
    assert type(small) is transformers.Dinov2ForImageClassification
    assert adapters.preprocess(small)["mean"] == (0.4, 0.5, 0.6)
    assert snapshot.load_spec(row["path"]).name == "my_dinov2"
    tune = ["finetune", row["path"], "--teacher", str(folder), "--epochs", "1", "--batch-size", "4", "--amp", "bf16"]
    assert cli.main([*tune, "--data", str(data), "--out", str(tmp_path / "f"), "--device", "cpu"]) == 0
    sparse = ["sparsify", str(folder), "--permute-seconds", "0.1", "--latency-batch", "2", "--device", "cpu"]
    assert cli.main([*sparse, "--out", str(tmp_path / "s")]) == 0
    assert len(nvit.load(tmp_path / "s").sparse24) == 2 * 6
    names = ["compare", str(folder), row["path"], "--seconds", "0.2", "--data", str(data), *QUICK]
    assert cli.main([*names, "--out", str(tmp_path / "c")]) == 0
    dense, other = json.loads((tmp_path / "c" / "result.json").read_text())["models"]
    assert other["peak_memory"] < dense["peak_memory"] and other["top1"] == row["top1"]


def broken(folder: Path, path: Path, what: str) -> None:
    """A copy of a good folder with one thing wrong."""
    good = hf.make("vit")
    if what == "pruned":
        good = pruned("vit")[1]
    good.save_pretrained(path)
    config = json.loads((path / hf_folder.CONFIG).read_text())
    changes = {
        "class": {"architectures": ["ViTMAEModel"]},
        "nameless": {"architectures": None},
        "value": {"hidden_size": "wide"},
    }
    (path / hf_folder.CONFIG).write_text(json.dumps(config | changes.get(what, {})))
    if what == "json":
        (path / hf_folder.CONFIG).write_text("{")
    elif what == "weights":
        (path / "model.safetensors").write_bytes(b"nothing")
    elif what == "no weights":
        (path / "model.safetensors").unlink()
    elif what == "headless":
        good.vit.save_pretrained(path)
        (path / hf_folder.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("json", "config.json is damaged"),
        ("class", "holds ViTMAEModel, which is not supported; expected ViTForImageClassification"),
        ("nameless", "holds a vit without architectures"),
        ("value", "does not load as a ViTForImageClassification"),
        ("weights", "does not load as a ViTForImageClassification"),
        ("no weights", "does not load as a ViTForImageClassification"),
        ("headless", "its weights lack classifier.bias, classifier.weight"),
        ("pruned", "Save a pruned model with nvit.hf.save_pretrained(model, folder)"),
    ],
)
def test_a_folder_with_something_wrong_is_one_line(what, says, folder, tmp_path, capsys):
    broken(folder, tmp_path / "bad", what)
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "bad"), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_flags_of_timm_models_do_not_fit_a_folder(folder, capsys):
    assert cli.main(["evaluate", str(folder), "--num-classes", "3"]) == 1
    assert "--num-classes 3 goes with a timm name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.vit.layers[0], "of transformers' classes it has to be one of ViTForImageClassification"),
        (lambda m: setattr(m, "classifier", torch.nn.Identity()) or m, "no linear classifier"),
        (lambda m: setattr(m.vit.layers[0].mlp, "activation_fn", torch.nn.PReLU()) or m, "a PReLU in its blocks"),
        (lambda m: setattr(m, "classifier", torch.nn.Linear(48, 3)) or m, "config has (7, 48) there; set model.config"),
    ],
    ids=["no classifier", "identity", "activation", "classifier of its own"],
)
def test_models_that_are_not_taken(change, says):
    model = change(hf.make("vit"))
    with pytest.raises(ValueError) as e:
        adapters.find(model).prepare(model)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_subclass_is_not_taken_for_its_parent():
    class Changed(transformers.ViTForImageClassification):
        def forward(self, *args, **more):
            return super().forward(*args, **more)

    with pytest.raises(ValueError, match="Changed is not supported"):
        adapters.find(Changed(transformers.ViTConfig(**hf.VIT)))


def test_an_old_transformers_is_named(folder, monkeypatch):
    model = hf.make("vit")
    monkeypatch.setattr(hf_hosts, "OLDEST", (99, 1))
    says = rf"transformers {transformers.__version__} is too old; pip install 'transformers>=99\.1'"
    for call in (lambda: adapters.find(model), lambda: hf_folder.open_folder(folder)):
        with pytest.raises(ValueError, match=says):
            call()


WITHOUT = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import timm
import nvit
from nvit.cli import main as cli
assert nvit.adapters.refusal(timm.create_model("vit_tiny_patch16_224", depth=1)) is None
assert nvit.adapters.refusal(timm.create_model("resnet18")) == "no adapter knows its class"
nvit.load(nvit.BUNDLED)
codes = [cli.main(["evaluate", path, "--device", "cpu"]) for path in sys.argv[1:]]
sys.exit(10 * codes[0] + codes[1])
"""


def test_without_transformers_a_line_says_how_to_get_it(folder, tmp_path):
    small = snapshot.save(tmp_path / "s", pruned("vit")[1])
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, folder, small], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 11, ran.stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == 2 and all("pip install 'nvit[hf]'" in line for line in lines)
