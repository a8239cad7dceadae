"""What a section is made of: prose, figures and tables, and what each section is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from .svg import NARROW, WIDE, Draw, drawn


@dataclass(frozen=True)
class Figure:
    """A figure twice: for a wide window and paper, and for a phone."""

    caption: str
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        marked: the row that is suggested, from 0.
        folded: shown when its caption is clicked.
        words: of words, which may take several lines; else of numbers.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    folded: bool = False
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; `lead` says what it shows in a sentence or two."""

    title: str
    lead: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Rows] = ()
    under: Sequence[Section] = field(default_factory=tuple)

    @property
    def key(self) -> str:
        """Its name in the page's address."""
        return "".join(c if c.isalnum() and c.isascii() else "-" for c in self.title.lower())


_numbers: Iterator[int] = itertools.count(1)


def figure(caption: str, label: str, draw: Draw) -> Figure:
    """Both versions of a figure.

    Args:
        label: what it shows, for whoever does not see it.
    """
    n = next(_numbers)
    return Figure(caption, drawn(draw, WIDE, label, f"f{n}w"), drawn(draw, NARROW, label, f"f{n}n"))
