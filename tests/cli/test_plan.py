"""What `nvit prune` says before and after a run: the plan, few images, the ways back from a loss."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

import nvit
from nvit.cli import advice, dry_run, prune
from nvit.cli import main as cli
from nvit.cli.flags import DataFlags, MachineFlags, ModelFlags

QUICK = ["--table", "analytic", "--latency-seconds", "0.4", "--latency-batch", "16", "--device", "cpu"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-train", "--latency-target", "0.8", "0.6", "--images", "64", "--batch-size", "16"],
        ["--no-train", "--refit", "--latency-target", "0.7", "--images", "64", "--batch-size", "16"],
        ["--latency-target", "0.8", "--interval", "2", "--bundles-per-step", "8", "--finetune-epochs", "0.2"],
    ],
    ids=["one shot", "refit", "training"],
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["prune", "--model", "digits", *flags, *QUICK, "--dry-run", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert not out.exists() and "nothing has been written" in said
    for part in ("model: digits, 0.", "targets: ", "images: ", "evaluate ", "together about", "memory: at most about"):
        assert part in said, part
    assert ("score, " in said and "decide" in said) == ("--no-train" in flags) and ("steps" in said) == (
        "--no-train" not in flags
    )
    assert ("64 to calibrate" in said) == ("--no-train" in flags)
    assert re.search(r"together about +\d+ (s|min)", said)


def test_a_plan_counts_the_images_the_models_and_the_targets(monkeypatch):
    """Seconds of rehearsals are held: what is left is arithmetic."""
    from nvit.prune import forecast
    from tests.runs import arguments

    model, data, settings, table = arguments(train=False, criterion="fisher", images=0, latency_target=(0.8, 0.5))
    taken = iter([(9.0, 50), (1.4, 100), (1.8, 160)])  # warm-up; two batches of 4 and of 8: 1 s beside, 0.05 an image
    monkeypatch.setattr(forecast.Watch, "of", lambda self, work: next(taken))
    monkeypatch.setattr(forecast, "_first_batch", lambda *_: ((None, None), 0.01))
    monkeypatch.setattr(forecast, "_cut", lambda batch, span: None)
    found = forecast.forecast_one_shot(model, data, settings, table)
    (stage,) = found.stages
    assert stage.seconds == pytest.approx(2 * (1.0 + 40 * (0.05 + 0.01))) and stage.count == "40 images, 2 times"
    assert found.peak == 160


def test_seconds_in_words():
    assert [dry_run.in_time(s) for s in (4.4, 99, 180, 7200)] == ["4 s", "99 s", "3 min", "2.0 h"]


def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    args = ["prune", "--model", "digits", "--no-train", *QUICK, "--dry-run", "--out", str(tmp_path / "o")]
    assert cli.main([*args, "--latency-target", "0.001"]) == 1
    assert "cannot be met: the smallest allowed widths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--refit", "--score-batches", "1"], "a refit needs 2 batches"),
        (["--latency-target", "0.01"], "latency target 0.01 of dense cannot be met"),
        (["--freeze", "blocks.9.*"], "matches no group"),
        (["--only", "mlp", "--freeze", "*.mlp"], "nothing is left to prune"),
    ],
)
def test_what_cannot_be_is_refused_before_the_dense_model_is_evaluated(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prune, "accuracy", lambda *_, **__: pytest.fail("images were evaluated first"))
    args = ["prune", "--model", "digits", "--no-train", *QUICK, *flags, "--out", str(tmp_path / "o")]
    assert cli.main(args) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "o").exists()


# --- advice -----------------------------------------------------------------------------------------------------------


def test_few_calibration_images_are_said_before_a_run_and_enough_are_not():
    one_shot = nvit.PruneConfig(train=False)
    line = advice.few_images(one_shot, 64)
    assert line.startswith("calibrated on 64 images, which are few") and "64 54.9 %" in line and "1000 64.1 %" in line
    assert "64 65.2 %" in advice.few_images(nvit.PruneConfig(train=False, refit=True), 299)
    assert advice.few_images(one_shot, 300) is None and advice.few_images(one_shot, None) is None
    assert advice.few_images(nvit.PruneConfig(), 64) is None, "training reads all"
    assert advice.few_images(nvit.PruneConfig(train=False, criterion="magnitude"), 64) is None


def test_the_gains_are_those_that_were_measured():
    path = Path(nvit.__file__).parents[1] / "benchmarks/results/refit_images_cpu.csv"
    with path.open() as file:
        rows = [r for r in csv.DictReader(file) if r["case"] != "dense"]
    for images, gains in advice.BY_IMAGES.items():
        mine = {r["refit"]: round(float(r["top1"]), 1) for r in rows if r["images"] == str(images)}
        assert gains == pytest.approx((mine["False"], mine["True"]), abs=0.051)


def found(before, *after):
    rows = [{"target": t, "top1": top1, "path": f"run/target-{t}"} for t, top1 in zip((0.8, 0.5), after, strict=False)]
    return {"dense": {"top1": before}, "snapshots": rows}


def lines(result, config=None, images=64, labelled=True, **flags):
    config = config or nvit.PruneConfig(train=False)
    parts = {"opening": ModelFlags(), "machine": MachineFlags(), "where": DataFlags(data="my data")} | flags
    return list(advice.ways_back("deit_tiny_patch16_224", config, images, result, labelled=labelled, **parts))


def test_a_large_loss_is_said_with_what_it_would_take():
    said = lines(found(87.0, 84.0, 11.0))
    assert said[0] == "target 0.5: top-1 fell by 76.0 points"
    assert [line.split()[0] for line in said[1:]] == ["--images", "--refit:", "--rounds", "nvit"]
    assert "run/target-0.5 " in said[-1] and "--data 'my data'" in said[-1]
    assert lines(found(87.0, 84.0, 82.5)) == [] and lines(found(None, None)) == []
    refitted = lines(found(87.0, 11.0), nvit.PruneConfig(train=False, refit=True, rounds=2), images=2000)
    assert [line.split()[0] for line in refitted] == ["target", "nvit"], "what was given is not advised"
    assert lines(found(87.0, 11.0), labelled=False)[-1].endswith("it needs images with labels")
    assert [line.split()[0] for line in lines(found(87.0, 11.0), nvit.PruneConfig())] == ["target", "nvit"]


def test_the_teacher_is_named_where_it_can_be_opened():
    opening = ModelFlags(checkpoint="w.safetensors")
    where = DataFlags(data="d", class_map="c.txt", resize=False)
    words = shlex.split(
        advice.finetune_line(
            "p", "deit_tiny_patch16_224", opening=opening, machine=MachineFlags(threads=2), where=where
        )
    )
    for flag, value in (("--teacher", "deit_tiny_patch16_224"), ("--teacher-checkpoint", "w.safetensors")):
        assert words[words.index(flag) + 1] == value
    assert "--no-resize" in words and words[words.index("--threads") + 1] == "2"
    for other in (ModelFlags(pretrained=False), ModelFlags(num_classes=7)):
        assert "--teacher" not in advice.finetune_line("p", "m", opening=other, machine=MachineFlags(), where=where)


def test_the_line_that_is_printed_runs_as_it_stands(tmp_path, capsys):
    out = tmp_path / "run"
    args = ["prune", "--model", "digits", "--no-train", "--criterion", "magnitude", "--latency-target", "0.3"]
    assert cli.main([*args, *QUICK, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    said = capsys.readouterr().out
    (line,) = [line.strip() for line in said.splitlines() if line.strip().startswith("nvit finetune")]
    assert line in [w.strip() for w in result["ways_back"]] and "top-1 fell by" in said
    words = shlex.split(line)[1:]
    words[words.index("--epochs") + 1] = "0.05"
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run" / "target-0.3-finetuned" / "result.json").read_text())["top1_se"] > 0


def test_every_accuracy_has_its_standard_error(tmp_path, capsys):
    assert cli.main(["evaluate", "digits", "--eval-images", "50", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["top1_se"] < 10 and f"{result['top1']:.2f} ± {result['top1_se']:.2f}" in capsys.readouterr().out
