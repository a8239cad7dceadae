"""What repeated timings say, and tables that are measured again where two timings of one model differ."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvit.latency import clock, measure
from nvit.latency import table as table_module
from nvit.latency.clock import Stopwatch
from nvit.latency.spread import ROUNDS, differ, drifted, ratio_to_first, steady
from nvit.latency.table import LatencyTable
from tests.hosts import images, make

SMALL_BUNDLES = {"emb": 16, "heads": 1, "qk_dim": 8, "v_dim": 8, "mlp": 16}


def busy(rng, rounds, ratio=0.6):
    """Milliseconds of two models on a busy machine: what slows a round slows both, and each alone now and then."""
    both = 100 * (1 + rng.exponential(0.1, (rounds, 1)))
    return both * (1 + rng.exponential(0.05, (rounds, 2))) * [1, ratio]


def test_a_ratio_lies_within_its_spread_nineteen_times_of_twenty():
    rng = np.random.default_rng(0)
    found = [ratio_to_first(busy(rng, 30), 1) for _ in range(300)]
    inside = sum(abs(r.value - 0.6) <= r.spread for r in found)
    assert inside >= 0.92 * 300 and np.mean([r.spread for r in found]) < 0.03
    assert ratio_to_first(busy(rng, 30), 0).spread == 0


def test_what_slows_a_round_slows_both():
    slow = np.array([1.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.0, 4.0])
    ratio = ratio_to_first(np.stack([10 * slow, 6 * slow], 1), 1)
    assert ratio.value == pytest.approx(0.6) and ratio.spread < 1e-12


def test_timings_differ_where_their_middle_half_is_more_than_a_tenth_away():
    steadily = np.full(9, 12.0)
    assert differ(steadily, 10.0) and not differ(steadily, 11.5) and differ(steadily, 14.0)
    assert not differ(np.array([8.0, 12.0, 20.0]), 10.0), "rounds so far apart say nothing"
    assert drifted(np.array([1.0] * 5 + [1.5] * 5)) and not drifted(np.ones(10))
    assert not drifted(np.array([1.0, 2.0])), "too few to tell"


@pytest.mark.parametrize(("noise", "most"), [(0.0, ROUNDS), (0.2, 400)])
def test_a_busy_machine_is_measured_for_longer_and_not_for_ever(noise, most, monkeypatch):
    rng, now = np.random.default_rng(0), {"s": 0.0}

    def round_(self):
        now["s"] += 0.1
        return ((1 + rng.exponential(noise, 2)) * [10, 5]).tolist()

    monkeypatch.setattr(Stopwatch, "round", round_)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now["s"], thread_time=lambda: 0.0))
    pair = [make("plain"), make("plain", depth=1)]
    rounds = clock.time_rounds(pair, images(pair[0], 2), 5 if noise else 0.5)
    assert rounds.shape[1] == 2 and len(rounds) <= most
    assert steady(rounds) or len(rounds) == 400
    assert len(rounds) > 50 if noise else len(rounds) == ROUNDS


@pytest.fixture
def clocked(monkeypatch):
    """Tables whose dense model takes as many milliseconds as `ms` says, and the number of whole measurements."""
    now = {"ms": 10.0, "measured": 0}
    whole = measure.time_pieces

    def round_(self):
        return [now["ms"] for _ in self._runs]

    def counted(*args):
        now["measured"] += 1
        return whole(*args)

    monkeypatch.setattr(Stopwatch, "round", round_)
    monkeypatch.setattr(measure, "LEVELS", dict.fromkeys(measure.LEVELS, 2))
    monkeypatch.setattr(table_module, "time_pieces", counted)
    return now


def test_a_kept_table_is_measured_again_where_the_dense_model_takes_another_time_now(clocked, tmp_path):
    def dense_ms():
        model = make("plain")
        return LatencyTable.measure(model, 2, bundle_sizes=SMALL_BUNDLES, seconds=0.02, cache=tmp_path).dense_ms

    assert dense_ms() == pytest.approx(10.0) and clocked["measured"] == 1
    clocked["ms"] = 10.5
    assert dense_ms() == pytest.approx(10.0) and clocked["measured"] == 1, "a twentieth is no other machine"
    clocked["ms"] = 13.0
    assert dense_ms() == pytest.approx(13.0) and clocked["measured"] == 2
    assert dense_ms() == pytest.approx(13.0) and clocked["measured"] == 2, "the new one was kept"


def test_a_machine_that_changes_while_a_table_is_measured_is_measured_again(monkeypatch):
    asked, rounds = [], Stopwatch.rounds

    def changing(self, end, least=1):
        asked.append(rounds(self, 0.0))
        slow = np.array([1.0] * 5 + [2.0] * 5) if len(asked) == 1 else np.full(10, 2.0)
        return np.ones((10, len(self._runs))) * slow[:, None]

    monkeypatch.setattr(Stopwatch, "rounds", changing)
    monkeypatch.setattr(measure, "LEVELS", dict.fromkeys(measure.LEVELS, 2))
    table = LatencyTable.measure(make("plain"), 2, torch.device("cpu"), bundle_sizes=SMALL_BUNDLES, seconds=0.02)
    assert len(asked) == 2 and table.dense_ms == pytest.approx(2.0), "by the machine as it is now"
