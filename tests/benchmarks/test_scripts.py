"""Every script that takes arguments says what it measures, and experiments do not import each other."""

import ast
import importlib
from pathlib import Path

import pytest

from benchmarks import harness

ROOT = Path(harness.__file__).parent
ROOMS = ("kernels", "engine", "accuracy")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text()


SCRIPTS = [name_of(p) for p in sorted(ROOT.rglob("*.py")) if is_script(p) and "def main(" in p.read_text()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch, capsys):
    bench = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("path", [p for room in ROOMS for p in sorted((ROOT / room).glob("*.py"))], ids=str)
def test_no_experiment_imports_another(path):
    """What two of them need is a module of its own, which runs nothing."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            other = ROOT.parent / Path(*node.module.split(".")).with_suffix(".py")
            assert not other.exists() or not is_script(other), f"{path.name} imports {node.module}, which is a script"
