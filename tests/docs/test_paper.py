"""docs/paper.md has a row for every table, figure and appendix of the paper, and its commands can be given."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from nvit.cli.main import parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text()
PARTS = [
    *(f"Table {i}" for i in range(1, 8)),
    *(f"Figure {i}" for i in range(1, 5)),
    *("Sec. 3.2.3", "Sec. 4.1", "Sec. 5.3"),
    *(f"Appendix {part}" for part in ("A.1", "A.2", "A.3", "B", "C.1", "C.2")),
]
"""What the paper's text has, or says that its appendix has."""
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.S)
SPANS = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
CODE = [line for block in BLOCKS for line in block.splitlines()] + [" ".join(span.split()) for span in SPANS]
NVIT = sorted({c.split("#")[0].strip() for c in CODE if re.match(r"nvit \w+ ", c) and "…" not in c})
SCRIPTS = sorted({c.split()[2] for c in CODE if c.startswith("python -m ")})


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_a_row_with_what_is_here(part):
    lines = re.findall(rf"^\| \[?{re.escape(part)}(?:\]\(#[\w-]+\))? \| (.+) \| (.+) \| (.+) \|$", PAGE, re.M)
    assert len(lines) == 1 and all(len(cell.strip()) > 3 for cell in lines[0])


def test_the_appendix_of_ablations_is_told_one_by_one():
    assert all(re.search(rf"^\| {part} \| .+ \| .+ \|$", PAGE, re.M) for part in ("B.1", "B.3", "B.4", "B.6"))
    assert "Figure 3 and Appendix B.5" in PAGE


@pytest.mark.parametrize("command", NVIT)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    chosen, config, _ = parse(words)
    named = getattr(config, chosen.models)
    assert named, "a model or a run"


def test_scripts_are_there():
    assert len(NVIT) > 10 and len(SCRIPTS) > 4
    missing = [name for name in SCRIPTS if importlib.util.find_spec(name) is None]
    assert not missing, missing
