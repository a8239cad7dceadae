"""A real run to report on, made once for all processes: digits in one shot at four targets, which takes seconds."""

import shutil

import pytest
from markupsafe import Markup

from nvit.cli import main as cli
from nvit.report import section

RUN = """--no-train --criterion fisher --images 32 --latency-target 0.9 0.7 0.6 0.5 --table analytic --device cpu
--latency-seconds 0.2 --latency-batch 4 --eval-images 40"""


@pytest.fixture(scope="session")
def whole(once):
    """The folder of that run, to be read alone."""

    def make(folder):
        assert cli.main(["prune", "digits", *RUN.split(), "--out", str(folder / "run")]) == 0

    return once("report", make) / "run"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def words_alone(monkeypatch):
    """Pages without their figures, which take the longest to make."""
    monkeypatch.setattr(section, "drawn", lambda *_: Markup("<svg></svg>"))
