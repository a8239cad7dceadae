"""Figures inside a page: drawn by matplotlib, in the page's own colours, so that light and dark suit them."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from ..utils import style

WIDE, NARROW = 800, 384
"""Pixels of a figure beside a desk's page, and of one on a phone."""

Draw = Callable[[Path, int], None]
"""Draws a figure into a file, so many pixels wide."""

_VARIABLES = {c: f"var(--c{i})" for i, c in enumerate(style.COLOURS)} | {
    style.INK: "currentColor",
    style.BEHIND: "var(--behind)",
    style.SETTINGS["grid.color"]: "var(--grid)",
    "#FFFFFF": "none",
}


def drawn(draw: Draw, pixels: int, label: str, prefix: str) -> Markup:
    """A figure as an `<svg>` that says what it shows.

    Args:
        label: what somebody who cannot see it should know.
        prefix: of the ids inside, which have to be its own in the page.
    """
    import matplotlib

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box; tables have the name
        with matplotlib.rc_context({"svg.hashsalt": "nvit"}):
            draw(Path(folder) / "figure.svg", pixels)
        text = (Path(folder) / "figure.svg").read_text()
    return _in_page(text, label, prefix)


def as_text(name: str, most: int = 28) -> str:
    """A name as matplotlib shows it letter by letter, on one line, not too long."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("\\", "/").replace("$", r"\$")


def _in_page(text: str, label: str, prefix: str) -> Markup:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    for colour, variable in _VARIABLES.items():
        body = re.sub(rf"{colour}\b", variable, body, flags=re.I)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", body)
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    said = Markup('<svg role="img" aria-label="{}" {} xmlns:xlink="http://www.w3.org/1999/xlink">').format(
        label, Markup(box.group(0) if box else "")
    )
    return said + Markup(re.sub(r"\s*\n\s*", "\n", rest))
