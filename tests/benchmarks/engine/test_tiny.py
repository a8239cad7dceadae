"""The scripts for a GPU run every line on a CPU, on two small blocks; what fails is a row, not the end."""

import csv

import pytest
import timm
import torch

from benchmarks.engine import merged_deit, pruned_deit, pruning_loop, training_step
from nvit import adapters
from nvit.analysis.evaluate import parameters
from nvit.structure.compact import compact


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Run a script's tiny form and read its CSV."""

    def run(module, *words):
        monkeypatch.setattr("sys.argv", [module.__name__, "--tiny", "--seconds", "0", "--out", str(tmp_path), *words])
        code = module.main()
        (path,) = tmp_path.glob("*.csv")
        with path.open() as file:
            return code, list(csv.DictReader(file))

    return run


def test_training_steps(rows):
    code, found = rows(training_step, "--no-compile")
    assert code == 0 and [r["case"] for r in found] == [
        "timm, dense",
        *["engine, dense", "compact twin of half", "engine, masked to half"] * 2,
    ]
    assert all(float(r["ms"]) > 0 and float(r["error"]) < 1e-5 for r in found)


def test_a_broken_case_is_a_row_and_the_others_are_measured(rows, monkeypatch):
    real = training_step.halves

    def broken(setting, twin):
        if twin:
            return real(setting, twin)
        raise RuntimeError("index on another device\nmore")

    monkeypatch.setattr(training_step, "halves", broken)
    code, found = rows(training_step, "--no-compile")
    by = {(r["case"], r["kernels"]): r for r in found}
    assert code == 1 and by["engine, masked to half", "True"]["note"] == "RuntimeError: index on another device"
    assert float(by["compact twin of half", "False"]["ms"]) > 0


def test_a_wrong_model_is_not_timed(rows, monkeypatch):
    real = training_step.dense_engine

    def wrong(setting):
        model = real(setting)
        torch.nn.init.normal_(model.head.weight)
        return model

    monkeypatch.setattr(training_step, "dense_engine", wrong)
    code, found = rows(training_step, "--no-compile")
    assert code == 1 and all("not timed" in r["note"] and not r["ms"] for r in found if r["case"] == "engine, dense")


def test_pruning_loop(rows):
    code, found = rows(pruning_loop)
    assert code == 0 and found[0]["case"] == "timm dense, eager"
    ratios = [float(r["ratio"]) for r in found if r["case"] == "nvit.prune"]
    assert ratios[0] == 1 and ratios == sorted(ratios, reverse=True) and len(ratios) >= 2
    assert all(float(r["images_per_s"]) > 0 for r in found)


def test_a_run_that_breaks_after_a_decision_keeps_what_came_before(rows, monkeypatch):
    real = pruning_loop.MarkedLoader.__iter__

    def breaking(self):
        for i, batch in enumerate(real(self)):
            if i == 5:
                raise RuntimeError("index on another device")
            yield batch

    monkeypatch.setattr(pruning_loop.MarkedLoader, "__iter__", breaking)
    code, found = rows(pruning_loop)
    assert code == 1 and [r["ratio"] for r in found] == ["1.0", "1.0", ""]
    assert found[-1]["note"] == "RuntimeError: index on another device"


def test_segments_lie_between_decisions():
    marks = [0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert pruning_loop.segments(marks, [(8, 0.8), (16, 0.5)], 8) == [
        {"ratio": 1.0, "step_s": 0.625, "settled_s": 0.75},
        {"ratio": 0.8, "step_s": 0.5, "settled_s": 0.5},
    ]


def test_the_plain_loop_learns_from_its_teacher():
    setting = pruning_loop.Setting.of(True, 2, "deit_base_distilled_patch16_224")
    step = pruning_loop.plain_step(setting, [setting.batch(setting.create())])
    step()
    step()  # AdamW moves weights in both; a loss that were NaN would end in NaN weights
    student = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    assert all(p.isfinite().all() for p in student.parameters())


def test_pruned_latencies(rows):
    code, found = rows(pruned_deit, "--table-seconds", "0.5")
    by = {r["case"]: r for r in found}
    assert code == 0 and list(by) == ["timm dense", "dense", "half"]
    assert float(by["half"]["predicted_ratio"]) < 1 and float(by["half"]["speed_up"]) > 0 and by["half"]["ratio_error"]


def test_merged_latencies(rows, monkeypatch):
    code, found = rows(merged_deit, "--table-seconds", "0.5", "--seconds", "0.2")
    assert code == 0 and [(r["case"], r["macs"]) for r in found][:2] == [("dense", "1.0"), ("dense", "0.65")]
    whole, merged = found[:2]
    assert int(whole["tokens_left"]) == 5 > int(merged["tokens_left"]) and float(merged["plain_ms"]) > 0
    assert float(merged["ratio"]) > 0 and float(merged["ratio_error"]) == pytest.approx(
        float(merged["predicted_ratio"]) / float(merged["ratio"]) - 1, abs=1e-3
    )
    monkeypatch.setattr(merged_deit, "wrong", lambda *a: 0.5)
    code, found = rows(merged_deit, "--table-seconds", "0.1", "--seconds", "0.1")
    assert code == 1 and not any(r.get("measured_ms") for r in found)


def test_a_model_of_other_widths_is_not_timed(rows, monkeypatch, capsys):
    monkeypatch.setattr(pruned_deit, "wrong", lambda *a: "it is another")
    monkeypatch.setattr("sys.argv", ["pruned_deit", "--tiny", "--table-seconds", "0.1"])
    assert pruned_deit.main() == 1 and "half: the cut model is wrong: it is another" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "millions"), [("B", 33), ("H", 30), ("S", 20), ("T", 6.5)])
def test_widths_have_the_papers_parameters(name, millions):
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    small = compact(model, groups, pruned_deit.uniform(groups, pruned_deit.WIDTHS[name]))
    assert parameters(small) / 1e6 == pytest.approx(millions, rel=0.025)  # the paper's are of other widths by block
