"""The folder of a run: its names, what of it is kept, and how a run goes on from it."""

import json

import numpy as np
import pytest
import torch

import nvit
from nvit import LatencyTable, snapshot
from nvit.latency.grid import Grid
from nvit.prune.api import finetune_snapshots
from nvit.prune.folder import RunFolder
from nvit.prune.result import Pruned
from tests.hosts import make
from tests.runs import Stop, arguments, stop_after


def test_a_finished_run_keeps_what_was_found_and_no_state(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    table = folder.table(lambda: LatencyTable.analytic(make("plain")))
    folder.write_history([{"step": 1}])
    folder.save(Pruned(0.5, nvit.load(nvit.BUNDLED), 0.49))
    for state in (folder.state_file, folder.finetune_state(0.5), folder.finetune_state(0.25)):
        state.write_bytes(b"state")
    (folder.path / "my_state.safetensors").write_bytes(b"the user's own")
    folder.finish({"top1": 80.0})
    names = ["history.csv", "latency_table.json", "my_state.safetensors", "result.json", "target-0.5"]
    assert sorted(p.name for p in folder.path.iterdir()) == names
    assert json.loads((folder.path / "result.json").read_text()) == {"top1": 80.0}
    assert LatencyTable.load(folder.path / "latency_table.json").dense == table.dense
    word = {"met": True, "judged_by": "table"}
    assert snapshot.load_metrics(folder.path / "target-0.5") == {"target": 0.5, "predicted_ratio": 0.49} | word
    with pytest.raises(ValueError, match=r"run holds a finished run; choose another --out or remove it"):
        RunFolder(tmp_path / "run").begin()
    RunFolder(tmp_path / "run", resume=True).begin()


def test_a_resumed_run_decides_with_the_table_it_began_with(tmp_path):
    model, made = make("plain"), []

    def make_table():
        made.append(LatencyTable.analytic(model))
        return made[-1]

    RunFolder(tmp_path).table(make_table)
    assert RunFolder(tmp_path, resume=True).table(make_table).dense == made[0].dense and len(made) == 1
    RunFolder(tmp_path).table(make_table)
    assert len(made) == 2, "a new run measures anew"


def test_a_resumed_run_decides_by_the_same_bits(tmp_path):
    """With milliseconds of many digits, as a clock gives them: the table comes back to the last bit, and with it the
    history."""

    def fresh():
        model, data, settings, table = arguments(criterion="abs")
        rng = np.random.default_rng(0)
        grids = {
            n: Grid(g.kinds, g.axes, g.values * (1 + 1e-6 * rng.random(g.values.shape)) / 3e3)
            for n, g in table.grids.items()
        }
        return model, data, settings, LatencyTable(table.parts, grids, table.dense, None)

    *rest, table = fresh()
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert all(np.array_equal(again.grids[n].values, g.values) for n, g in table.grids.items())
    assert again.dense_ms == table.dense_ms
    whole = nvit.prune(*rest, table)

    def run(resume, **more):
        *given, made = fresh()
        folder = RunFolder(tmp_path / "run", resume)
        return nvit.prune(*given, folder.table(lambda: made), out=tmp_path / "run", resume=resume, **more)

    with pytest.raises(Stop):
        run(False, progress=stop_after(4))
    assert run(True).history == whole.history


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(resume=True)
    folder.begin()
    folder.table(lambda: LatencyTable.analytic(make("plain")))
    folder.write_history([{"step": 1}])
    folder.save(Pruned(0.5, make("plain"), 0.49))
    folder.finish({})
    assert folder.state_file is folder.finetune_state(0.5) is None and not folder.resumable()
    assert not list(tmp_path.iterdir())


def finetuned(out, resume=False, progress=nvit.prune.__kwdefaults__["progress"]):
    model, data, settings, table = arguments(criterion="abs", finetune_epochs=2.0)
    result = nvit.prune(model, data, settings, table, out=out, resume=resume)
    finetune_snapshots(result, data, settings, folder=RunFolder(out, resume), progress=progress)
    return result


def weights(path):
    return dict(nvit.load(path).named_parameters())


def test_finetuning_goes_on_at_the_step_and_trains_no_snapshot_twice(tmp_path):
    """Interrupted within the second snapshot's epochs: the first is not touched, the second ends as if never."""
    finetuned(tmp_path / "whole")
    with pytest.raises(Stop):
        finetuned(tmp_path / "run", progress=stop_after(13))
    (tmp_path / "run" / "finetune_state_0.8.safetensors").unlink()  # nobody needs it: the snapshot itself says so
    steps = []
    finetuned(tmp_path / "run", resume=True, progress=lambda done, total, text: steps.append(done))
    assert 0 < len(steps) < 10 and steps[-1] == 10
    for target in ("target-0.8", "target-0.5"):
        whole, again = weights(tmp_path / "whole" / target), weights(tmp_path / "run" / target)
        assert all(torch.equal(again[n], p) for n, p in whole.items()), target
        assert snapshot.load_metrics(tmp_path / "run" / target)["finetuned_epochs"] == 2.0
