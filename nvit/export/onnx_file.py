"""ONNX, read by onnxruntime; TensorRT, OpenVINO and others read it as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Format, Program

if TYPE_CHECKING:
    import onnxruntime


class OnnxFile(Format):
    """`model.onnx`, with `model.onnx.data` beside it where weights are too large for one file."""

    name, suffix, runtime = "onnx", ".onnx", "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, program: Program, path: Path) -> None:
        weights = sum(t.numel() * t.element_size() for t in program.exported.state_dict.values())
        program.onnx.save(path, external_data=weights > program.external_bytes)

    def open(self, path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
        running = session(path, threads)
        name = running.get_inputs()[0].name
        return lambda images: torch.from_numpy(running.run(None, {name: images.contiguous().numpy()})[0])


def session(path: Path | str, threads: int, **settings: Any) -> onnxruntime.InferenceSession:
    """A file in onnxruntime on the CPU; one thread is the caller's own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors alone
    for key, value in settings.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
