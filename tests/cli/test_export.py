"""`nvit export` as people call it."""

import json

import pytest

from nvit.cli.main import main


def test_digits_become_a_file(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "digits", "--format", "torch", "--out", str(out), "--seconds", "0.1"]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["checked_on"] == "digits" and found["preprocess"]["input_size"] == [1, 8, 8]
    [file] = found["files"]
    assert file["files"] == ["model.pt2"] and file["bytes"] > 0 and file["latency_ms"] > 0
    said = capsys.readouterr().out
    assert "max difference" in said and "compared on digits at 1 and 3 images a batch" in said
    assert {p.name for p in out.iterdir()} == {"model.pt2", "result.json"}


def test_without_images_the_table_says_noise(tmp_path, capsys):
    words = ["export", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--format", "torch"]
    assert main([*words, "--static-batch", "2", "--seconds", "0", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "batch of 2; compared on seeded noise at 2 images a batch" in shown


WRONG = {
    "refused by name": (["--format", "onnx", "script"], "format script is refused: TorchScript is deprecated"),
    "no batch": (["--no-dynamic-batch"], "--static-batch N"),
    "a GPU": (["--device", "cuda"], "made and checked on the CPU"),
    "too large": (["--external-mb", "5000"], "not between 0 and 2000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_that_make_no_sense(case, tmp_path, capsys):
    words, said = WRONG[case]
    assert main(["export", "digits", *words, "--out", str(tmp_path / "x")]) in (1, 2)
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()
