"""Stopwatches: calls in turn on a CPU; on a GPU the device's own time, cold, and the host's time to enqueue; memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

Call = Callable[[], object]
Spread = tuple[float, float, float]
"""Median, 20th and 80th percentile."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms: on a GPU the device's time alone, on a CPU the wall clock's.
        host_ms: what the host needs to enqueue the call on a GPU; None on a CPU.
        note: how it was measured, where not in the usual way.
    """

    ms: Spread
    host_ms: Spread | None = None
    note: str = ""


def spread(times: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile."""
    ordered = sorted(times)
    return tuple(ordered[len(ordered) * tenths // 10] for tenths in (5, 2, 8))


def in_turns(
    calls: Mapping[str, Call],
    *,
    least: int = 7,
    seconds: float = 0.0,
    dropped: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of single calls, all of them in turn, so that whatever else the machine does meets them all alike.

    Args:
        least: rounds that count; more follow while `seconds` last, to 200.
        dropped: rounds before them, to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(dropped + 200):
        if turn >= dropped + least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: mine[dropped:] for name, mine in times.items()}


def cpu_seconds(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, all of them in turn, `rounds` times after one warm-up round."""
    return in_turns(calls, least=rounds, clock=time.process_time)


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of `a / b`: what slows a round down slows both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def timings(calls: Mapping[str, Call], seconds: float = 0.4) -> dict[str, Timing]:
    """Timing of each call, on the GPU if there is one; about `seconds` a call."""
    if torch.cuda.is_available():
        return {name: on_gpu(call, seconds) for name, call in calls.items()}
    found = in_turns(calls, seconds=seconds * len(calls))
    return {name: Timing(spread([1e3 * t for t in times])) for name, times in found.items()}


def on_gpu(call: Call, seconds: float = 0.4) -> Timing:
    """Device time of a call as a CUDA graph replays it, inputs out of the L2 cache, and its host time eagerly.

    A call that cannot be captured, one that reads a result back for instance, is timed between two events instead; then
    a host slower than the device counts as the device's time, and the note says so.
    """
    host = _host_ms(call, seconds / 4)
    try:
        return Timing(spread(_replayed_ms(call, seconds)), host)
    except RuntimeError as refused:
        torch.cuda.synchronize()
        reason = str(refused).strip().splitlines()[0][:80]
        return Timing(spread(_between_events(call, seconds)), host, f"not captured ({reason})")


def back_to_back(call: Call, seconds: float = 1.0, chunk: int = 5) -> Spread:
    """Milliseconds a call when calls follow each other, as steps do in a loop: whichever of host and device is slower.

    Args:
        chunk: calls between two synchronisations; the percentiles are over chunks.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        for _ in range(chunk):
            call()
        wait()
        times.append(1e3 * (time.perf_counter() - start) / chunk)
    return spread(times)


@cache
def _flushes(count: int) -> torch.cuda.CUDAGraph:
    return capture([_flush()] * count)


@cache
def _flush() -> Call:
    """Reads four times what the L2 cache holds: it leaves no dirty lines that the next call would have to write."""
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    source = torch.zeros(max(size, 64 << 20) // 4, device="cuda")
    return source.sum


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all the calls in order, each run twice before.

    Not by `torch.cuda.graph`, which gives all free memory back first: a tenth of a second for each of hundreds.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _replayed_ms(call: Call, seconds: float) -> list[float]:
    """Replays of (flush, call) n times less replays of the n flushes alone, over n; the two in turn."""
    flush = _flush()
    once = min(_between_events(call, 0.0))
    count = max(1, min(20, round(4 / once)))
    both = capture([flush, call] * count)
    alone = _flushes(count)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 8 or (len(times) < 40 and time.perf_counter() < end):
        times.append((_event_ms(both.replay) - _event_ms(alone.replay)) / count)
    return times[1:]


def _between_events(call: Call, seconds: float) -> list[float]:
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() < end):
        times.append(_event_ms(call))
    return times


def _event_ms(call: Call) -> float:
    """Device time of one call; a flush before it keeps the device busy until the host has enqueued everything."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush()()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_ms(call: Call, seconds: float) -> Spread:
    """Wall-clock time until a call returns to the host, the device idle before it."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() < end):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return spread(times)


def peak_mib(prepare: Callable[[], Call]) -> float:
    """MiB by which the call that `prepare` returns raises resident memory at most, in a forked child. Linux only."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_peak_child, args=(there, prepare))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError("the child that measures memory died; see its error above") from None
    finally:
        child.join()


def _peak_child(pipe, prepare: Callable[[], Call]) -> None:
    from nvit.utils.memory import Meter

    step = prepare()
    meter = Meter("cpu")  # what preparation freed does not hide what the step takes
    start = meter.held
    step()
    pipe.send((meter.peak - start) / 2**20)
