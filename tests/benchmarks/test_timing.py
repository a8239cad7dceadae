"""The stopwatches: who takes turns with whom, what is subtracted on a GPU, and what is said where that fails."""

import time

import pytest
import torch

from benchmarks import timing


def test_spread_is_of_order_statistics():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 5.0)


def test_calls_are_timed_in_turn_after_a_warm_up():
    seen = []
    calls = {"slow": lambda: (seen.append("slow"), time.sleep(0.01)), "fast": lambda: seen.append("fast")}
    times = timing.in_turns(calls, least=3)
    assert seen == ["slow", "fast"] * 4 and all(len(t) == 3 for t in times.values())
    assert min(times["slow"]) >= 0.01 > min(times["fast"])


def test_cpu_seconds_do_not_count_waiting():
    assert max(timing.cpu_seconds({"waits": lambda: time.sleep(0.05)}, 2)["waits"]) < 0.04


def test_back_to_back_is_the_time_a_call():
    median, _, _ = timing.back_to_back(lambda: time.sleep(0.004), seconds=0.0, chunk=3)
    assert median >= 4


class Clock:
    """A GPU in numbers: a flush takes 50 ms on its events, a call 3, a graph what is in it."""

    def __init__(self, monkeypatch, captures=True):
        self.flush = lambda: None
        self.cost = {self.flush: 50.0}
        monkeypatch.setattr(timing, "_flush", lambda: self.flush)
        monkeypatch.setattr(timing, "_event_ms", lambda call: self.cost[call])
        monkeypatch.setattr(timing, "_host_ms", lambda call, seconds: (0.7, 0.6, 0.8))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing, "capture", self.capture if captures else self.refuse)
        self.sizes = []

    def capture(self, calls):
        class Graph:
            def replay(self):
                raise AssertionError("only its time is asked for")

        graph = Graph()
        replay = graph.replay
        graph.replay = replay
        self.cost[replay] = sum(self.cost[c] for c in calls)
        self.sizes.append(len(calls))
        return graph

    def refuse(self, calls):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(("ms", "count"), [(0.1, 20), (1.0, 4), (50.0, 1)])
def test_flushes_are_taken_off_and_short_calls_repeated(monkeypatch, ms, count):
    clock, call = Clock(monkeypatch), lambda: None
    clock.cost[call] = ms
    found = timing.on_gpu(call, seconds=0.0)
    assert found.ms == pytest.approx((ms, ms, ms)) and found.host_ms == (0.7, 0.6, 0.8) and not found.note
    assert clock.sizes == [2 * count, count]


def test_a_call_that_cannot_be_captured_is_timed_between_events(monkeypatch):
    clock, call = Clock(monkeypatch, captures=False), lambda: None
    clock.cost[call] = 2.0
    found = timing.on_gpu(call, seconds=0.0)
    assert found.ms == (2.0, 2.0, 2.0)
    assert found.note == "not captured (operation not permitted when stream is capturing)"
