"""What all figures share: panels side by side, drawn without a screen, saved as a PNG."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def panels(count: int, width: float, height: float, path: Path | str, **shared: bool) -> Iterator[list[Any]]:
    """`count` axes in a row to draw on; saved to `path` when the block ends.

    Args:
        width, height: of one panel, in inches.
        shared: `sharex` or `sharey`, as `subplots` takes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained", **shared)
    try:
        yield list(axes[0])
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
