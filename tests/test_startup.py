"""`import nvit`, help and typos do not wait for torch; what the package hands out is there when it is asked for."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import nvit

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "timm", "numpy", "scipy", "matplotlib", "accelerate", "safetensors")


def run(code: str) -> tuple[subprocess.CompletedProcess, float]:
    """A process, and the seconds of CPU it took."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done, used() - before


COMMANDS = {
    "nothing": ([], 2),
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "a command's help": (["prune", "--help"], 0),
    "a typo of a command": (["prun", "deit"], 2),
    "a typo of a flag": (["prune", "deit", "--modle", "x"], 2),
    "a typo of a value": (["finetune", "deit", "--amp", "fp8"], 2),
    "no model": (["prune"], 2),
}


ASK = """import sys
from nvit.cli.main import main
try:
    code = main({args})
except SystemExit as e:
    code = e.code
assert (code or 0) == {code}, code
"""
LIGHT = f"found = set({HEAVY}) & sys.modules.keys()\nassert not found, found"


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line_answers_without_torch(case):
    args, code = COMMANDS[case]
    done, seconds = run(ASK.format(args=args, code=code) + LIGHT)
    assert done.returncode == 0, done.stderr
    assert seconds < 0.8, "0.5 s on a quiet core, 0.2 to 0.4 of them used"
    assert done.stderr.count("\n") == (1 if code == 2 and args else 0)


def test_importing_the_package_imports_nothing_else():
    done, seconds = run(f"import sys, nvit\n{LIGHT}")
    assert done.returncode == 0 and seconds < 0.5, (done.stderr, seconds)


def test_every_name_is_where_type_checkers_are_told():
    tree = ast.parse((ROOT / "nvit" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    said = {a.name: node.module for node in block.body for a in node.names}
    assert {name: nvit._HOMES.get(name) for name in nvit.__all__} == said
    assert all(getattr(nvit, name) is not None for name in nvit.__all__) and set(nvit.__all__) <= set(dir(nvit))
    with pytest.raises(AttributeError, match="has no attribute 'purne'"):
        _ = nvit.purne


def test_the_function_is_not_hidden_by_the_room_of_its_name():
    done, _ = run(
        "from nvit.prune.folder import RunFolder\nimport nvit\nassert nvit.prune.__module__ == 'nvit.prune.api'"
    )
    assert done.returncode == 0, done.stderr


def test_load_knows_what_sparse_weights_are_run_on():
    done, _ = run("import nvit\nnvit.load\nfrom nvit.structure import snapshot\nassert snapshot.FINISHERS")
    assert done.returncode == 0, done.stderr


def test_who_is_interrupted_before_torch_is_there_is_answered():
    done, _ = run(f"import sys\nfrom nvit.cli.flags.prune import PruneCommand\nPruneCommand().states()\n{LIGHT}")
    assert done.returncode == 0, done.stderr
