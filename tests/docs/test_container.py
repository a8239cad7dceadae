"""The Dockerfile, which no test can build, keeps to commands that are tested elsewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    """What a Dockerfile runs, a command each."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [c.strip() for run in re.findall(r"^RUN (.*)$", joined, re.M) for c in run.split("&&")]


def known() -> set[str]:
    """Install commands of README and Makefile, without how the latter calls pip."""
    readme = re.search(r"## Install\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    make = re.sub(r"\$\(RUN\) -m pip install --quiet", "pip install", (ROOT / "Makefile").read_text())
    return {line.split("  #")[0].strip() for line in (*readme.splitlines(), *make.splitlines())}


def test_the_container_runs_what_readme_and_makefile_run():
    own = ("apt-get ", "rm -rf /var/lib/apt/lists", "python3 -m venv ")
    said = [c for c in commands((ROOT / "Dockerfile").read_text()) if not c.startswith(own)]
    assert len(said) == 5 and not set(said) - known(), set(said) - known()


def test_it_says_that_nobody_built_it_and_what_it_starts():
    text = (ROOT / "Dockerfile").read_text()
    assert "Nobody has built it" in text and 'ENTRYPOINT ["nvit"]' in text
    assert text.index("ARG BASE=") < text.index("FROM ${BASE}"), "a CUDA image is a build argument"


def test_what_git_leaves_out_stays_out_of_the_image():
    left_out = {line.removeprefix("**/").strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert ignored | {".git"} <= left_out
