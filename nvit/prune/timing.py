"""The clock of a run: a compact model timed in turn with the dense one, in the table's setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import parallel
from ..latency.clock import TORCH, Setting, in_dtype, time_rounds
from ..latency.measure import sample_images
from ..latency.spread import Ratio, ratio_to_first
from .aim import Clock

Timer = Callable[[Sequence[nn.Module], Tensor, float, str], np.ndarray]
"""Milliseconds `(rounds, models)` of models on images, for seconds, in a mode."""


class Ratios(Protocol):
    """Latencies of models as fractions of the dense one's, as measured in turn."""

    def __call__(self, others: Sequence[nn.Module], *, rough: bool = False) -> list[Ratio]:
        """`rough`: in as few rounds as a spread needs, however busy the machine is."""


def ratios_of(
    setting: Setting | None, seconds: float, dense: Callable[[], nn.Module], timer: Timer = time_rounds
) -> Ratios | None:
    """What measures the models of a run; None where the table counts operations, or `seconds` is 0.

    Args:
        seconds: for the dense model and another one; more take longer.
        dense: makes the model that latencies are fractions of; called at each reading, so that nobody keeps it.
    """
    if setting is None or not seconds:
        return None
    dtype = getattr(torch, setting.dtype)

    def read(others: Sequence[nn.Module], *, rough: bool = False) -> list[Ratio]:
        models = [in_dtype(m, dtype) for m in (dense(), *others)]

        def timed() -> list[Ratio]:
            images = sample_images(models[0], setting.batch_size)
            elsewhere = {} if setting.runtime == TORCH else {"runtime": setting.runtime}
            given = 0.0 if rough else seconds * len(models) / 2
            rounds = timer(models, images, given, setting.mode, **elsewhere)
            return [ratio_to_first(rounds, i) for i in range(1, len(models))]

        return parallel.from_main(timed)

    return read


def clock_of(ratios: Ratios | None) -> Clock | None:
    """The same for one model at a time."""
    return None if ratios is None else lambda model: ratios([model])[0]
