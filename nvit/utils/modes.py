"""Ways to run a function of tensors on a device again and again: as it is, as a CUDA graph, compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Runner = Callable[[Function, tuple[Tensor, ...], Any], Callable[[], Any]]
"""Makes a function ready to be run on these inputs, and returns what runs it. The last argument is memory to share
with others (`shared_memory`), for functions whose results nobody wants; None for memory of its own."""


def eager(function: Function, inputs: tuple[Tensor, ...], memory: Any = None) -> Callable[[], Any]:
    """The function as it is."""
    return lambda: function(*inputs)


def captured(function: Function, inputs: tuple[Tensor, ...], memory: Any = None) -> Callable[[], Any]:
    """A CUDA graph of the function. A replay enqueues all its work at once, reads what the inputs hold by then, and
    returns the same result tensors each time, filled anew.

    The function runs twice before, so that whatever is chosen, tuned or loaded at first use is there. Not captured by
    `torch.cuda.graph`, which first gives all free memory back: a tenth of a second for each of hundreds.

    Raises:
        RuntimeError: the function reads something back from the device, or cannot be captured for another reason.
    """
    with torch.cuda.device(inputs[0].device):
        current, stream, graph = torch.cuda.current_stream(), _side_stream(inputs[0].device), torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(*inputs)
            function(*inputs)
            torch.cuda.synchronize()
            # Only this thread is watched: others, as a data loader's, may call CUDA meanwhile.
            graph.capture_begin(memory, capture_error_mode="thread_local")
            try:
                with _no_autocast_cache():
                    out = function(*inputs)
                if memory is not None:
                    out = None
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(stream)

    def replay() -> Any:
        graph.replay()
        return out

    return replay


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A weight that autocast casts is cast by the graph itself: a copy it keeps is gone when autocast ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where everything is captured: the next capture finds the memory that one freed on the same stream alone."""
    return torch.cuda.Stream(device)


def shared_memory(device: torch.device) -> Any:
    """A pool for graphs captured one after another, none of whose results is kept."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def compiled(function: Function, **options: Any) -> Function:
    """A function of tensors, or a model's call, through `torch.compile`: one graph without a break, compiled at first
    use for the shapes it meets.

    Several may come from one function, as the snapshots of a run do: each keeps to itself what was compiled for it,
    where torch would count them against one limit. Another shape compiles again, so pad a last batch
    (`nvit.serve.FixedBatch`) or leave it out.

    Args:
        options: of `torch.compile`, in place of `fullgraph=True, dynamic=False`.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # torch keeps what it compiled by code object
    return torch.compile(call, **{"fullgraph": True, "dynamic": False} | options)


def compiled_run(function: Function, inputs: tuple[Tensor, ...], memory: Any = None) -> Callable[[], Any]:
    """The function compiled and, on CUDA, captured in a graph: what `torch.compile(mode="reduce-overhead")` serves."""
    runner = captured if inputs[0].is_cuda else eager
    return runner(compiled(function), inputs, memory)


RUNNERS: dict[str, Runner] = {"eager": eager, "graph": captured, "compile": compiled_run}
"""By mode."""
