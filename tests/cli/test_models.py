"""From words and flags to models: checkpoints as other frameworks write them, and flags that do not apply."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import nvit
from nvit.cli import main as cli
from nvit.cli.checkpoint import misfit, unwrapped
from nvit.cli.flags import ModelFlags
from nvit.cli.models import open_model, open_models, snapshot_of, untrained
from nvit.structure import snapshot
from tests.families import hf

NAME = "vit_tiny_patch16_224"
SIZE = {"num_classes": 7, "img_size": 32}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME, **SIZE).state_dict()


def opened(file, **more):
    return open_model(NAME, ModelFlags(checkpoint=str(file), **(SIZE | more)), torch.device("cpu"))


def refused(file, says: str, **more):
    with pytest.raises(ValueError, match=says) as e:
        opened(file, **more)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


WRAPPED = {
    "as timm": lambda s: s,
    "Lightning": lambda s: {"epoch": 3, "state_dict": {f"model.{n}": t for n, t in s.items()}},
    "DistributedDataParallel": lambda s: {"model": {f"module.{n}": t for n, t in s.items()}},
    "compiled in Lightning": lambda s: {"state_dict": {f"model._orig_mod.{n}": t for n, t in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "a backbone": lambda s: {"state_dict": {f"backbone.{n}": t for n, t in s.items()}},
    "in a container twice": lambda s: {"model": {"state_dict": s}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_containers_and_prefixes_are_taken_off(how, weights, tmp_path):
    torch.save(WRAPPED[how](weights), tmp_path / "w.pth")
    model = opened(tmp_path / "w.pth")
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_of_several_models_each_takes_the_options_of_its_kind(weights, tmp_path):
    """A dense model from a file beside a run's snapshots: what pruning without the network is compared by."""
    save_file(weights, tmp_path / "w.safetensors")
    dense = opened(tmp_path / "w.safetensors")
    snapshot.save(tmp_path / "run" / "target-0.5", dense)
    flags = ModelFlags(checkpoint=str(tmp_path / "w.safetensors"), target=0.5, num_classes=7, img_size=(32,))
    for names in ([NAME, f"{tmp_path}/run"], [f"{tmp_path}/run", NAME]):
        for model in open_models(names, flags, torch.device("cpu")):
            assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="goes with a timm name"):
        open_models([f"{tmp_path}/run"] * 2, flags, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"--target 0\.5 is of a run's folder"):
        open_models([NAME, "digits"], flags, torch.device("cpu"))


def without(state, *names):
    return {n: t for n, t in state.items() if n not in names}


def test_what_does_not_fit_is_named(weights, tmp_path):
    save_file(
        without(weights, "norm.weight", "norm.bias") | {"loss.temperature": torch.ones(1)}, tmp_path / "w.safetensors"
    )
    says = r"2 missing \(norm\.weight, norm\.bias\); 1 unexpected \(loss\.temperature\)$"
    refused(tmp_path / "w.safetensors", says)
    torch.save({f"encoder.layer.{i}.ln1.weight": torch.ones(2) for i in range(9)}, tmp_path / "o.pth")
    says = r"\d+ missing \(cls_token, .*, …\); 9 unexpected \(encoder\.layer\.0\.ln1\.weight, .*4\.ln1\.weight, …\)$"
    refused(tmp_path / "o.pth", says)


def test_another_number_of_classes_says_which_flag(weights, tmp_path):
    save_file(dict(weights), tmp_path / "w.safetensors")
    says = r"2 of another shape \(head\.weight is \(7, 192\), expected \(9, 192\), .*give --num-classes 7"
    refused(tmp_path / "w.safetensors", says, num_classes=9)


def test_an_image_size_that_was_asked_for_resamples_positions_and_another_does_not(weights, tmp_path):
    save_file(dict(weights), tmp_path / "w.safetensors")
    assert opened(tmp_path / "w.safetensors", img_size=64).pos_embed.shape[1] == 17
    says = r"1 of another shape \(pos_embed is \(1, 5, 192\), expected \(1, 197, 192\)\)"
    refused(tmp_path / "w.safetensors", says, img_size=0)


@pytest.mark.parametrize("content", [b"", b"half a file", b"\x80\x02}q\x00."])
def test_what_is_no_state_dict_is_one_line(content, tmp_path):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} (cannot be read|is no state dict)")


def test_a_pickled_model_is_not_unpickled(tmp_path):
    torch.save(timm.create_model(NAME, depth=1), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "cannot be read: ")


def test_nothing_is_unwrapped_where_names_fit_already():
    state = {"model.weight": torch.ones(1)}
    assert unwrapped(state, ["model.weight"]) == state
    assert misfit({"a": (1,)}, {"a": (1,)}) == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "m"
    hf.make("vit").save_pretrained(path)
    return str(path)


SNAPSHOT, TIMM = "digits", NAME
NOT_FOR_THEM = {
    "classes of a snapshot": (SNAPSHOT, {"num_classes": 7}, "--num-classes 7 goes with a timm name; .* is a snapshot"),
    "checkpoint of a snapshot": (SNAPSHOT, {"checkpoint": "w.pth"}, r"--checkpoint w\.pth goes with a timm name"),
    "size of a snapshot": (SNAPSHOT, {"img_size": (8, 9)}, "images of 8 × 9: 9 is no multiple of the patches' side"),
    "size of Hugging Face's": ("hf", {"img_size": 32}, "--img-size 32 goes with a timm name; .* is a Hugging Face"),
    "classes of Hugging Face's": ("hf", {"num_classes": 7}, "--num-classes 7 goes with a timm name"),
    "patches that do not fit": (TIMM, {"img_size": 33, "pretrained": False}, "--img-size 33: .* take 32 or 48$"),
    "less than a patch": (TIMM, {"img_size": 7, "pretrained": False}, "--img-size 7: .* take 16$"),
    "less than none": (TIMM, {"num_classes": -3, "pretrained": False}, "--num-classes -3 is negative"),
}


@pytest.mark.parametrize("case", NOT_FOR_THEM)
def test_flags_that_do_not_apply_are_refused(case, folder):
    name, flags, says = NOT_FOR_THEM[case]
    with pytest.raises(ValueError, match=says) as e:
        open_model(folder if name == "hf" else name, ModelFlags(**flags), torch.device("cpu"))
    assert "\n" not in str(e.value)


def test_a_checkpoint_beside_scratch_is_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="--scratch starts from random weights; leave it out"):
        open_model(NAME, ModelFlags(checkpoint=str(tmp_path / "w.pth")), torch.device("cpu"), scratch=True)


def test_the_command_line_says_it_in_one_line(capsys):
    assert cli.main(["evaluate", "digits", "--num-classes", "7"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("nvit: --num-classes 7 goes with a timm name") and err.count("\n") == 1


def test_a_snapshot_without_a_manifest_is_one_line_on_stderr(tmp_path, capsys):
    shutil.copytree(nvit.BUNDLED, tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    open_model(str(tmp_path / "s"), ModelFlags(), torch.device("cpu"))
    err = capsys.readouterr().err
    assert err.startswith("nvit: ") and "has no manifest.json" in err and err.count("\n") == 1


def test_the_bundled_snapshot_loads_without_a_word():
    command = "import nvit.cli.main; import nvit; nvit.load(nvit.BUNDLED)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and "manifest" not in done.stderr, done.stderr


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two targets."""
    for target in ("0.8", "0.5"):
        shutil.copytree(nvit.BUNDLED, tmp_path / "run" / f"target-{target}")
    (tmp_path / "run" / "target-half").mkdir()
    return tmp_path / "run"


def test_a_runs_folder_is_its_smallest_target_or_the_one_asked_for(run, tmp_path, capsys):
    assert snapshot_of(str(run)) == str(run / "target-0.5") and snapshot_of(str(run), 0.8) == str(run / "target-0.8")
    assert snapshot_of("digits") == str(nvit.BUNDLED) and snapshot_of(NAME) == NAME
    assert not untrained(str(run), ModelFlags(pretrained=False))
    with pytest.raises(ValueError, match=r"has no snapshot at 0\.3; it has 0\.5, 0\.8"):
        snapshot_of(str(run), 0.3)
    with pytest.raises(ValueError, match=r"--target 0\.5 is of a run's folder, which .* is not"):
        snapshot_of(NAME, 0.5)
    widths = ["analyze", "widths", "digits", str(run), "--out", str(tmp_path / "w")]
    assert cli.main(widths) == 0 and str(run) in (tmp_path / "w" / "widths.csv").read_text()
    assert cli.main(["evaluate", str(run), "--target", "0.8", "--eval-images", "8", "--device", "cpu"]) == 0
    assert cli.main(["evaluate", str(run), "--target", "0.9", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("nvit: ")


def test_a_folder_that_timm_wrote_is_a_model(tmp_path):
    model = timm.create_model(NAME, **SIZE)
    timm.models.save_for_hf(model, tmp_path / "m", safe_serialization=True)
    found = open_model(f"local-dir:{tmp_path / 'm'}", ModelFlags(img_size=32), torch.device("cpu"))
    theirs = model.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in found.state_dict().items())
    for name in ("local-dir:/no/such", "hf-hub:no/such"):
        with pytest.raises(ValueError, match=r"(pretrained weights cannot be had|the hub cannot be asked)"):
            open_model(name, ModelFlags(), torch.device("cpu"))
