"""Looks at a figure as it is drawn: every text on it, and whether two lie on each other or one leaves the figure."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SIZES = (600, 1600)
"""Pixels of width that every figure is for."""


@contextlib.contextmanager
def texts_drawn() -> Iterator[dict[str, tuple[str, Bbox, Bbox]]]:
    """Texts drawn while this is open, with their boxes and the figure's: the last drawing of each counts."""
    found: dict[int, tuple[str, Bbox, Bbox]] = {}
    draw = Text.draw

    def watched(self, renderer):
        draw(self, renderer)
        if self.get_visible() and self.get_text().strip():
            found[id(self)] = (self.get_text(), self.get_window_extent(renderer), self.figure.bbox.frozen())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", watched)
        yield found


def collisions(found: dict[str, tuple[str, Bbox, Bbox]]) -> list[str]:
    """A line for each two texts that overlap by more than half a pixel, and for each that is cut off."""
    said = []
    for (a, box, _), (b, other, _) in itertools.combinations(found.values(), 2):
        shared = Bbox.intersection(box, other)
        if shared is not None and min(shared.width, shared.height) > 0.5:
            said.append(f"{a!r} lies on {b!r}")
    for text, box, figure in found.values():
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > figure.x1 + 0.5 or box.y1 > figure.y1 + 0.5:
            said.append(f"{text!r} is cut off")
    return said
