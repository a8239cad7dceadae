"""Curves of a run: where they are written, and that a resumed run goes on with them."""

import csv
import dataclasses
import json
import sys

import pytest

import nvit
from nvit.cli import main as cli
from nvit.utils import logs
from tests.runs import Stop, arguments, stop_after


def rows(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def scalars(folder):
    """What TensorBoard itself reads: `(step, value)` by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def interrupted(kind, folder):
    """A run killed after step 4 whose last state was of step 2, gone on with to step 5; and a stage after it."""
    with logs.opened(kind, folder) as log:
        for step in (1, 2, 3, 4):
            log("prune", step, {"loss": 0.5 * step, "ratio": 0.9})
    with logs.opened(kind, folder, resume=True) as log:
        for step in (3, 4, 5):
            log("prune", step, {"loss": 10.0 * step, "ratio": 0.8})
        log("finetune_0.5", 1, {"loss": 7.0, "lr": 1e-3})


def test_csv_goes_on_where_the_state_was(tmp_path):
    interrupted("csv", tmp_path)
    found = [(r["stage"], int(r["step"]), float(r["loss"])) for r in rows(tmp_path)]
    assert found == [
        ("prune", 1, 0.5), ("prune", 2, 1.0), ("prune", 3, 30.0), ("prune", 4, 40.0), ("prune", 5, 50.0),
        ("finetune_0.5", 1, 7.0),
    ]  # fmt: skip
    with logs.opened("csv", tmp_path) as log:
        log("prune", 1, {"loss": 1.0})
    assert len(rows(tmp_path)) == 1, "a new run is a new log"


def test_tensorboard_reads_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    interrupted("tensorboard", tmp_path)
    assert scalars(tmp_path / "prune")["loss"] == [(1, 0.5), (2, 1.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert scalars(tmp_path / "finetune_0.5")["lr"] == [(1, pytest.approx(1e-3))]


def test_trackio_stays_on_this_machine(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    said = []
    monkeypatch.setattr(trackio, "init", lambda **how: said.append(how))
    monkeypatch.setattr(trackio, "log", lambda values, step: said.append((step, values)))
    monkeypatch.setattr(trackio, "finish", lambda: said.append("finished"))
    with logs.opened("trackio", tmp_path / "run" / "log", resume=True) as log:
        log("prune", 3, {"loss": 2.0})
    how, row, end = said
    assert how["project"] == "nvit" and how["resume"] == "allow" and how["name"].endswith("run-log")
    assert "space_id" not in how and row == (3, {"prune/loss": 2.0}) and end == "finished"
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    with pytest.raises(ValueError, match="TRACKIO_SPACE_ID is set"), logs.opened("trackio", tmp_path):
        pass


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_what_is_not_installed_is_one_line(kind, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    said = ["prune", "digits", "--data", "digits", "--log", kind, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(said) == 1
    err = capsys.readouterr().err
    assert "pip install 'nvit[log]'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with logs.opened("csv", tmp_path) as log:
        log("prune", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


QUICK = ("--table", "analytic", "--latency-seconds", "0.1", "--latency-batch", "2", "--device", "cpu")
SHORT = ("--batch-size", "64", "--eval-images", "8", "--measure-seconds", "0")


def test_a_run_writes_what_it_does(tmp_path):
    run = ["prune", "digits", "--data", "digits", "--latency-target", "0.9", "--interval", "1", "--log", "csv"]
    out = tmp_path / "run"
    assert cli.main([*run, "--finetune-epochs", "0.1", "--out", str(out), *QUICK, *SHORT]) == 0
    found = rows(out / "log")
    pruning = [r for r in found if r["stage"] == "prune"]
    tuning = [r for r in found if r["stage"] == "finetune_0.9"]
    assert [int(r["step"]) for r in pruning] == list(range(1, len(pruning) + 1))
    assert all(float(r["loss"]) > 0 and float(r["images_per_s"]) > 0 for r in found)
    ratios = [float(r["ratio"]) for r in pruning]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] <= 0.9
    decided = [r for r in pruning if r["mlp"]]
    small = nvit.snapshot.load_spec(out / "target-0.9").blocks
    for kind, width in dataclasses.asdict(small[0]).items():
        assert float(decided[-1][kind]) == sum(getattr(b, kind) for b in small) / len(small) <= 256, width
    assert tuning and all(float(r["lr"]) > 0 for r in tuning)
    result = json.loads((out / "result.json").read_text())
    assert result["recipe"]["log"] == "csv"


def test_one_shot_says_widths_and_what_a_refit_left():
    said = []
    model = nvit.load(nvit.BUNDLED)
    loader = nvit.data.TrainingData(nvit.data.Digits(training=True), batch_size=16)
    config = nvit.PruneConfig(latency_target=(0.9, 0.8), train=False, refit=True, images=32, measure_seconds=0)
    table = nvit.LatencyTable.analytic(model)
    result = nvit.prune(model, loader, config, table, log=lambda *row: said.append(row))
    assert [(stage, step) for stage, step, _ in said] == [("prune", 1), ("prune", 2)]
    assert said[-1][2]["ratio"] == result.snapshots[-1].predicted_ratio
    assert {"emb", "heads", "qk_dim", "v_dim", "mlp", "refit_error"} < said[-1][2].keys() <= set(logs.COLUMNS)


def test_an_interrupted_run_has_the_log_of_one_that_was_not(tmp_path):
    """Stopped twice, each time after more steps than its last state holds."""

    def run(folder, stop=0):
        how = {"progress": stop_after(stop)} if stop else {}
        with logs.opened("csv", tmp_path / folder / "log", resume=True) as log:
            nvit.prune(*arguments(save_every=0.05), out=tmp_path / folder, resume=True, log=log, **how)

    run("whole")
    for calls in (3, 5):
        with pytest.raises(Stop):
            run("stopped", calls)
    run("stopped")
    whole, stopped = (
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(tmp_path / folder / "log")]
        for folder in ("whole", "stopped")
    )
    assert len(whole) > 8 and stopped == whole
