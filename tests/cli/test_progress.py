"""One bar for all that a command does: each stage its share, the time left, and never silent for long."""

import io
import re
import time

import pytest
from rich.console import Console

from nvit.cli import compare, finetune, prune
from nvit.cli import main as cli
from nvit.utils import progress
from nvit.utils.stages import Stage, Tracker

PLAN = [Stage("measuring", 20, seconds=10), Stage("evaluate", 10), Stage("prune", 60), Stage("evaluate", 10)]
QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_shares_add_up_and_time_is_foretold():
    clock = Clock()
    tracker = Tracker(PLAN, clock)
    assert tracker.fraction == 0 and tracker.left is None
    tracker(0, 1, "measuring latency, about 10 s")
    clock.now = 10
    assert 0.1 < tracker.fraction < 0.2, "a stage that says nothing comes on by its time"
    clock.now = 1000
    assert tracker.fraction == pytest.approx(0.95 * 0.2), "but not to its end"
    clock.now = 20
    tracker(5, 10, "evaluate: top-1 81.20 %")
    assert tracker.fraction == pytest.approx(0.25) and tracker.left == pytest.approx(60)
    assert tracker.in_words() == "evaluate: top-1 81.20 % (5/10); 25% of all, 1:00 left"
    tracker(10, 10, "evaluate: top-1 81.20 %")
    tracker(300, 600, "prune: 0.8, loss 1.2")
    assert tracker.fraction == pytest.approx(0.6)
    tracker(0, 0, "a note that is no stage")
    assert tracker.fraction == pytest.approx(0.6) and tracker.text.startswith("a note")
    tracker(10, 10, "evaluate")
    assert tracker.fraction == 1 and tracker.left == 0


def test_opening_a_model_foretells_nothing():
    clock = Clock()
    tracker = Tracker([Stage("sensitivity", 100)], clock)
    clock.now = 100
    tracker(1, 4, "sensitivity")
    assert tracker.fraction == 0.25 and tracker.left is None, "how long the first step took is not known"
    clock.now = 107
    tracker(2, 4, "sensitivity")
    assert tracker.left == pytest.approx(14)
    tracker = Tracker([Stage("sensitivity", 100)], clock)
    tracker(1, 1, "sensitivity")
    assert tracker.left == 0, "nor when it was the only one"


def test_the_same_work_twice_is_two_stages_and_one_that_never_begins_is_over():
    tracker = Tracker([Stage("score", 1), Stage("refit", 1), Stage("score", 1), Stage("evaluate", 1)])
    tracker(3, 4, "score")
    tracker(4, 4, "score")
    assert tracker.fraction == 0.25
    tracker(1, 4, "score")
    assert tracker.fraction == pytest.approx(0.5 + 0.25 / 4), "a refit that was expected did not come"
    tracker(1, 2, "evaluate")
    assert tracker.fraction == pytest.approx(0.875)


def test_without_a_plan_the_steps_of_the_work_count():
    tracker = Tracker()
    tracker(1, 4, "anything")
    assert tracker.fraction == 0.25 and tracker.in_words() == "anything (1/4)"


class Recorded(Tracker):
    """A tracker in place of `shown`, with every part of the whole that it was at."""

    def __call__(self, done, total, text):
        super().__call__(done, total, text)
        self.parts = [*getattr(self, "parts", []), self.fraction]
        assert self.at >= 0 and text.startswith(self.stages[self.at].work), f"{text!r} is in no stage"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


FAST = ["demo", *QUICK, "--latency-target", "0.8", "0.7", "--eval-images", "16"]
RUNS = {
    "training": (prune, [*FAST, "--interval", "1", "--bundles-per-step", "6", "--finetune-epochs", "0.1"]),
    "one shot": (prune, [*FAST, "--no-train", "--refit", "--score-batches", "2", "--finetune-epochs", "0"]),
    "rounds": (prune, [*FAST, "--no-train", "--score-batches", "1", "--rounds", "2", "--finetune-epochs", "0"]),
    "finetuning": (finetune, ["finetune", "digits", "--epochs", "0.1", "--distill-weight", "0", "--device", "cpu"]),
    "comparing": (compare, ["compare", "digits", "digits", *QUICK, "--seconds", "0.2"]),
}


@pytest.mark.parametrize("how", RUNS)
def test_a_run_keeps_to_its_stages_and_only_goes_on(how, tmp_path, monkeypatch):
    work, args = RUNS[how]
    trackers = []
    monkeypatch.setattr(work, "shown", lambda stages: trackers.append(Recorded(stages)) or trackers[0])
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 0
    parts = trackers[0].parts
    assert parts == sorted(parts) and parts[-1] == pytest.approx(1)


def test_the_bar_at_80_columns(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with progress.shown(PLAN, console) as tell:
        tell(1, 2, "permute: blocks.10.mlp.fc1.weight keeps 0.8123 of its magnitude")
        time.sleep(0.3)
        tell(20, 60, "prune: 0.812, loss 0.345")
        tell(30, 60, "prune: 0.812, loss 0.345")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out.getvalue())
    assert "60 %" in shown and "left" in shown and "…" not in shown
    assert "0.8123 of its magnitude" in shown and max(map(len, shown.splitlines())) <= 80


def test_where_there_is_no_terminal_a_line_comes_however_silent_the_work(monkeypatch, capsys):
    lines = progress._Lines(Tracker(PLAN))
    lines.remind()
    assert not capsys.readouterr().err
    lines.at -= 11
    lines.remind()
    assert capsys.readouterr().err.startswith("starting; 0% of all"), "opening a model may take long"
    lines(0, 1, "measuring latency, about 40 s")
    lines(0, 1, "measuring latency, about 40 s")
    lines.remind()
    assert capsys.readouterr().err.count("\n") == 1
    lines.at -= 11
    lines.remind()
    assert capsys.readouterr().err.startswith("measuring latency, about 40 s; ")
    monkeypatch.setattr(progress, "QUIET", 0.0)
    ticks = []
    with progress._every(0.01, lambda: ticks.append(1)):
        time.sleep(0.2)
    assert len(ticks) > 2
    count = len(ticks)
    time.sleep(0.05)
    assert len(ticks) == count, "the thread ends with the work"
