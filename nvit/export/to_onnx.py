"""From torch.export's graph to ONNX, by torch's own exporter and optimizer."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..utils.files import short

OPSETS = range(18, 26)
"""What torch's exporter writes by itself; older ones only through converters that fail on attention."""


def to_onnx(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: tuple[Any, ...],
    opset: int,
    names: Sequence[str],
    outputs: Sequence[str],
) -> torch.onnx.ONNXProgram:
    """A model or a program in ONNX, by torch's exporter without its progress report.

    Args:
        inputs: to follow a model on, for batches of just that size; a program has its own.
        names, outputs: of what goes in and comes out.

    Raises:
        ValueError: an opset that is not written, or an operation that ONNX has not.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset {opset} is not written; expected {OPSETS[0]} to {OPSETS[-1]}")
    try:
        with quiet():
            return torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                optimize=True,
                opset_version=opset,
                input_names=list(names),
                output_names=list(outputs),
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
        raise ValueError(f"torch.onnx cannot convert this model at opset {opset}: {short(e, 200)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of their own internals on stderr and through warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
