"""Functions of a model made ready in another runtime, many in one conversion, for a clock to time.

A conversion costs seconds however little it converts, so all functions go into one graph side by side, which is then
cut into files of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import functional
from .base import OPSET
from .registry import formats
from .to_onnx import to_onnx

TORCH = "torch"
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Runtimes beside torch, and the format that says what they need."""

TOGETHER = 24
"""Functions in one conversion, so that a protobuf message holds their weights."""

Call = tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]
"""The module whose weights a function reads, the function, and what it is timed on."""


def runtime_version(name: str) -> str:
    """`onnxruntime 1.32.0`.

    Raises:
        ValueError: the runtime is unknown, or not installed.
    """
    if name == TORCH:
        return f"torch {torch.__version__}"
    if name not in RUNTIMES:
        raise ValueError(f"runtime {name!r} is unknown; expected one of {TORCH}, {', '.join(RUNTIMES)}")
    formats([RUNTIMES[name]])
    return f"{name} {version(name)}"


class _Together(nn.Module):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.hosts = nn.ModuleList(host for host, _, _ in calls)
        self.functions = [function for _, function, _ in calls]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x) for f, x in zip(self.functions, inputs, strict=True))


def ready(calls: Sequence[Call], runtime: str, threads: int) -> list[Callable[[], Any]]:
    """What runs each of `calls` on its input in a runtime, on so many threads of the CPU; one is the caller's own.

    Inputs and outputs have memory of their own that every run uses again, as a server's do.

    Raises:
        ValueError: something in them has no ONNX form, or the runtime is not installed.
    """
    runtime_version(runtime)
    found = []
    for start in range(0, len(calls), TOGETHER):
        found += _ready(calls[start : start + TOGETHER], runtime, threads)
    return found


def _ready(calls: Sequence[Call], runtime: str, threads: int) -> list[Callable[[], Any]]:
    import onnx_ir

    names = [f"in_{i}" for i in range(len(calls))]
    outputs = [f"out_{i}" for i in range(len(calls))]
    inputs = [x for _, _, x in calls]
    with torch.inference_mode(False), torch.no_grad(), functional.kernels(False):
        # Of memory of their own: inputs that share some would be taken for one.
        alike = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in inputs)
        model = to_onnx(_Together(calls).eval(), alike, OPSET, names, outputs).model
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.onnx"
        for name, output, x in zip(names, outputs, inputs, strict=True):
            graph = onnx_ir.convenience.extract(model.graph, [name], [output])
            piece = onnx_ir.Model(graph, ir_version=model.ir_version)
            onnx_ir.save(piece, path, external_data="piece.data")
            runs.append(_OPEN[runtime](path, x, threads))
    return runs


def _onnxruntime(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    from .onnx_file import session

    running = session(path, threads)
    binding = running.io_binding()
    shape = [int(n) for n in running.get_outputs()[0].shape]
    binding.bind_ortvalue_input(running.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
    out = onnxruntime.OrtValue.ortvalue_from_numpy(torch.empty(shape).numpy())
    binding.bind_ortvalue_output(running.get_outputs()[0].name, out)

    def run() -> Any:
        running.run_with_iobinding(binding)
        return out

    return run


def _openvino(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    import openvino

    from .openvino_ir import compiled_model

    request = compiled_model(path, threads).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor()

    return run


_OPEN = {"onnxruntime": _onnxruntime, "openvino": _openvino}
