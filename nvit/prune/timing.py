"""The clock of a run: a compact model timed in turn with the dense one, in the table's setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def clock_of(
    setting: Setting | None, seconds: float, dense: Callable[[], nn.Module], timer: Timer = time_rounds
) -> Clock | None:
    """A clock for the compact models of a run; None where the table counts operations, or `seconds` is 0.

    Args:
        dense: makes the model that latencies are fractions of; called at each reading, so that nobody keeps it.
    """
    if setting is None or not seconds:
        return None
    dtype = getattr(torch, setting.dtype)

    def read(compact: nn.Module) -> Ratio:
        models = [in_dtype(m, dtype) for m in (dense(), compact)]

        def timed() -> Ratio:
            images = sample_images(models[0], setting.batch_size)
            elsewhere = {} if setting.runtime == TORCH else {"runtime": setting.runtime}
            return ratio_to_first(timer(models, images, seconds, setting.mode, **elsewhere), 1)

        return parallel.from_main(timed)

    return read
