"""What users import says what it takes, what it gives and how it is used."""

import dataclasses
import doctest
import inspect
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from setuptools import Distribution

import nvit
from tests.public import functions, names

ROOT = Path(__file__).parents[1]


def test_every_parameter_and_result_has_a_hint():
    bare, seen = [], 0
    for name, function in functions():
        signature = inspect.signature(function)
        seen += 1
        for p in signature.parameters.values():
            if p.annotation is p.empty and p.name not in ("self", "cls"):
                bare.append(f"{name}({p.name})")
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            bare.append(f"{name} -> ?")
    assert seen > 80 and not bare, "\n".join(bare)


def test_the_walk_sees_classes_functions_and_doors():
    found = dict(names())
    assert {"nvit.prune", "nvit.PruneConfig", "nvit.LatencyTable", "nvit.data.Digits", "nvit.snapshot.save"} <= set(
        found
    )
    assert "nvit.LatencyTable.measure" in dict(functions())


def test_everything_public_is_documented():
    undocumented = [n for n, thing in (*names(), *functions()) if "__" not in n and not inspect.getdoc(thing)]
    assert not undocumented, "\n".join(undocumented)


GIVEN = {"dataclasses": dataclasses, "nvit": nvit, "Path": Path, "PIL": PIL, "timm": timm, "torch": torch}
"""What the examples need not import."""

DOCUMENTED = {name: inspect.getdoc(thing) or "" for name, thing in (*functions(), *names())}
EXAMPLES = {name: text for name, text in DOCUMENTED.items() if ">>>" in text}


def test_everything_public_has_an_example():
    bare = [name for name, thing in names() if ">>>" not in (inspect.getdoc(thing) or "")]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    text = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(text, dict(GIVEN), name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


def test_the_packages_say_that_they_are_typed(monkeypatch):
    """In the files that go into the wheel, by the build's own rules."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.script_name = "setup.py"
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    shipped = {f"{folder}/{file}" for _, folder, _, files in build.data_files for file in files}
    assert {"nvit/py.typed", "nvit_kernels/py.typed"} <= shipped
