"""OpenVINO's own files, made of the ONNX model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Format, Program
from .onnx_file import OnnxFile

if TYPE_CHECKING:
    import openvino


class OpenVinoIR(Format):
    """`model.xml` and its weights, `model.bin`."""

    name, suffix, runtime = "openvino", ".xml", "openvino"
    packages = ("onnx", "onnxscript", "openvino")

    def write(self, program: Program, path: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source = Path(folder) / "model.onnx"
            OnnxFile().write(program, source)
            # Weights stay as they are; by default OpenVINO would halve them.
            openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)

    def open(self, path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
        compiled = compiled_model(path, threads)
        return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())


def compiled_model(path: Path | str, threads: int) -> openvino.CompiledModel:
    """A file in OpenVINO on the CPU: one request at a time, in the precision that the file has."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino.Core().compile_model(str(path), "CPU", settings)
