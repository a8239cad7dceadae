"""Fill the tables of docs/*.md from the CSVs they are of; what stands between the tables is the page's own.

    python -m docs.fill_tables            every page
    python -m docs.fill_tables --check    name the pages that are not up to date, and change nothing

A page marks where a table goes by `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own; `docs.tables`
says what each name holds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.tables import (
    ablations,
    analyze,
    depth,
    evidence,
    features,
    figures,
    models,
    paper,
    refit,
    saliency,
    sparse24,
    tasks,
    tokens,
)

DOCS = Path(__file__).parent
MARKED = re.compile(r"^<!-- table: ([\w.]+) -->\n(?P<body>.*?)^<!-- end -->$", re.S | re.M)
PAGES: dict[str, Mapping[str, Callable[[], str]]] = {
    "ablations.md": ablations.TABLES,
    "analyze.md": analyze.TABLES,
    "depth.md": depth.TABLES,
    "evidence.md": evidence.TABLES,
    "features.md": features.TABLES,
    "models.md": models.TABLES,
    "paper.md": paper.TABLES,
    "refit.md": refit.TABLES,
    "refit_method.md": refit.METHOD,
    "saliency.md": saliency.TABLES,
    "sparse24.md": sparse24.TABLES,
    "tasks.md": tasks.TABLES,
    "tokens.md": tokens.TABLES,
}
"""By page, what makes each of its tables."""


def filled(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every marked table made anew.

    Raises:
        ValueError: a marker of a table that nobody makes, a table that the page has no place for, or a marker alone.
    """
    named = [name for name, _ in MARKED.findall(text)]
    marks = text.count("<!-- table:")
    if marks != len(named) or marks != text.count("<!-- end -->"):
        raise ValueError(f"{marks} tables begin, {text.count('<!-- end -->')} end; every marker has a line of its own")
    if sorted(named) != sorted(tables):
        raise ValueError(f"the page has places for {sorted(named)}, tables are made for {sorted(tables)}")
    return MARKED.sub(lambda m: f"<!-- table: {m[1]} -->\n{tables[m[1]]().rstrip()}\n<!-- end -->", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; all by default")
    parser.add_argument("--check", action="store_true", help="change nothing, end with 1 if a page is not up to date")
    parser.add_argument("--figures", action="store_true", help=f"draw {', '.join(figures.FIGURES)} as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.pages).difference(PAGES):
        parser.error(f"no tables are made for {sorted(unknown)}; there are {', '.join(PAGES)}")
    old = []
    for page in arguments.pages or PAGES:
        path = DOCS / page
        text = path.read_text()
        if (now := filled(text, PAGES[page])) != text:
            old.append(page)
            if not arguments.check:
                path.write_text(now)
    if arguments.figures:
        for name, draw in figures.FIGURES.items():
            draw(DOCS / name)
    if old:
        print(f"{'not up to date' if arguments.check else 'written'}: {', '.join(old)}")
    return int(arguments.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
