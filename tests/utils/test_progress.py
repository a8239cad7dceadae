"""A callback is called, True shows what the commands show, and neither changes what a function returns."""

import pytest

import nvit
from nvit.data import Digits, TrainingData
from nvit.utils import progress
from tests.runs import arguments


@progress.showing
def work(n: int, *, progress: progress.Progress | bool = False) -> int:
    """Some steps."""
    for i in range(n):
        progress(i + 1, n, "work: so far")
    return n


def test_a_callback_hears_every_step():
    heard = []
    assert work(2, progress=lambda *said: heard.append(said)) == 2
    assert heard == [(1, 2, "work: so far"), (2, 2, "work: so far")]


@pytest.mark.parametrize("asked", [{}, {"progress": False}])
def test_nothing_is_shown_unasked(asked, capsys):
    assert work(3, **asked) == 3
    assert capsys.readouterr() == ("", "")


def test_true_shows_a_line_for_each_kind_of_work_where_there_is_no_terminal(capsys):
    assert work(3, progress=True) == 3
    assert capsys.readouterr() == ("", "work: so far (1/3)\n")


def test_of_several_ranks_the_first_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert work(3, progress=True) == 3
    assert capsys.readouterr().err == ""


def test_pruning_finetuning_and_accuracy_can_be_watched(capsys):
    model, loader, config, table = arguments()
    result = nvit.prune(model, loader, config, table, progress=True)
    assert "prune: " in capsys.readouterr().err and result.snapshots
    epoch = nvit.FinetuneConfig(epochs=0.2, batch_size=8, distill_weight=0.0)
    nvit.finetune(result.model, loader, epoch, progress=True)
    assert "finetune: " in capsys.readouterr().err
    nvit.accuracy(result.model, loader, progress=True)
    assert "evaluate: " in capsys.readouterr().err


def test_a_table_measured_by_prune_is_announced(capsys, monkeypatch):
    model = nvit.load(nvit.BUNDLED)
    monkeypatch.setattr(nvit.LatencyTable, "measure", lambda model, *a, **k: nvit.LatencyTable.analytic(model))
    config = nvit.PruneConfig(train=False, score_batches=1, batch_size=8)
    nvit.prune(model, TrainingData(Digits(training=True), 8), config, progress=True)
    assert capsys.readouterr().err.startswith("measuring latency")
