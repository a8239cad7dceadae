"""docs/extend.md is done, not believed: a section's files and changes in a copy of the repository, then its lines."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
SECTIONS = {
    title: re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
"""By title: each fenced block's language and text."""


@pytest.fixture
def copy(tmp_path):
    """The repository without what git does not hold."""
    for folder in ("nvit", "nvit_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def write(block: str, root: Path) -> Path:
    """A new file from a block whose first line is its path."""
    first, _, text = block.partition("\n")
    assert re.fullmatch(r"# (nvit|nvit_kernels|tests)/[\w/]+\.py", first), f"{first!r} is no path"
    path = root / first.removeprefix("# ")
    assert not path.exists(), f"{path} is there already; the page wants a new file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def patch(block: str, root: Path) -> Path:
    """A file changed as a diff says; what it takes as given must be there once."""
    head, *hunks = re.split(r"^@@.*\n", block, flags=re.M)
    path = root / re.search(r"^\+\+\+ (\S+)$", head, re.M)[1]
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        text = path.read_text()
        assert text.count(before) == 1, f"{path} has not exactly once:\n{before}"
        path.write_text(text.replace(before, after))
    return path


def run(line: str, root: Path) -> None:
    """A shell line of the page; words before the command set its environment."""
    words = shlex.split(line, comments=True)
    settings = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    command = [sys.executable if w == "python" else w for w in words[len(settings) :]]
    env = os.environ | settings | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


MOST_SOURCES = {
    "An analysis": 1,
    "A criterion": 2,
    "A task": 2,
    "A command": 3,
    "A model family": 2,
    "An export format": 2,
}
"""Files beside tests that a section may touch; a kernel has a folder of its own."""
NEEDS = {"A kernel": ["triton"], "An export format": ["onnx", "onnxscript", "onnxruntime"]}
"""Packages without which a section is not run."""


@pytest.mark.parametrize("title", SECTIONS)
def test_what_a_section_says_works(title, copy):
    for package in NEEDS.get(title, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not there")
    touched, lines = set(), []
    for language, block in SECTIONS[title]:
        if language == "python":
            touched.add(write(block, copy))
        elif language == "diff":
            touched.add(patch(block, copy))
        else:
            lines += block.splitlines()
    sources = {p.relative_to(copy).as_posix() for p in touched if p.relative_to(copy).parts[0] != "tests"}
    assert len(sources) <= MOST_SOURCES.get(title, len(sources)), sources
    assert sources and lines, "a section has files and a line that shows they work"
    for line in lines:
        run(line, copy)


def test_the_page_has_all_its_sections():
    titles = ["An analysis", "A criterion", "A task", "A command", "A model family", "An export format", "A kernel"]
    assert list(SECTIONS) == titles


def test_examples_are_in_the_house_style(copy):
    blocks = [block for section in SECTIONS.values() for language, block in section if language == "python"]
    paths = [str(write(block, copy)) for block in blocks]
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, *paths]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
