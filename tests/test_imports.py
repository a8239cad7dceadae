"""Imports point one way between rooms, so that every file can be read with only those before it in mind.

A room is a package or a file directly in nvit/. Read `ORDER` from the top: a room knows those in rows above its own.
`config` stands behind `criteria`, whose registry is the one list of their names and of what each can do.
"""

import ast
import statistics
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"utils"},
    {"spec"},
    {"layers"},
    {"adapters"},
    {"structure"},
    {"parallel"},
    {"tasks", "export"},
    {"latency", "calibration", "zoo"},
    {"criteria", "selection", "serve"},
    {"config"},
    {"refit", "training"},
    {"sparse24"},
    {"prune", "about"},
    {"analysis", "integrations"},
    {"report"},
    {"cli"},
]
DOORS = {"__init__", "__main__", "data", "hf", "hub", "snapshot"}
"""Files directly in nvit/ that hand on what lives in rooms, under names that users import, and hold nothing else."""
KERNEL_DOORS = {"nvit/layers/functional.py", "nvit/sparse24/kernels.py"}
MOST_ROOMS, MOST_LINES, MEDIAN_LINES = 24, 350, 150


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, relative ones resolved, at any depth of nesting."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            names |= {f"{base.strip('.')}.{a.name}" for a in node.names}
    return names


def where(path: Path) -> str:
    """`nvit/spec.py`, from the root."""
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """`nvit/latency/grid.py` -> `latency`."""
    return path.relative_to(ROOT / "nvit").with_suffix("").parts[0]


def file_of(dotted: str) -> Path | None:
    """The file of nvit that `nvit.latency.grid.Grid` is imported from: `nvit/latency/grid.py`."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if parts[0] == "nvit" and file in FILES:
                return file
    return None


FILES = {p: imported(p) for folder in ("nvit", "nvit_kernels") for p in sorted((ROOT / folder).rglob("*.py"))}
ENGINE = {p: names for p, names in FILES.items() if where(p).startswith("nvit/")}
ROOMS = sorted({room_of(p) for p in ENGINE} - DOORS)


def neighbours(path: Path) -> Iterator[tuple[str, Path]]:
    """What a file of the engine imports from other files of it; the package's own version apart."""
    for name in sorted(ENGINE[path]):
        file = file_of(name)
        if file is not None and file != path and name != "nvit.__version__":
            yield name, file


def test_every_room_has_its_place_and_they_are_few():
    assert set(ROOMS) <= set().union(*ORDER), "a room is in no row of ORDER"
    assert 15 < len(ROOMS) <= MOST_ROOMS, ROOMS
    assert sum(len(list(neighbours(p))) for p in ENGINE) > 200, "imports are seen"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_or_stay_in_their_room(room):
    level = {name: row for row, names in enumerate(ORDER) for name in names}
    late = [
        f"{where(path)} imports {name}"
        for path in ENGINE
        if room_of(path) == room
        for name, file in neighbours(path)
        if room_of(file) != room and not level.get(room_of(file), len(ORDER)) < level[room]
    ]
    assert not late, "\n".join(late)


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_do_not_import_in_circles(room):
    files = [path for path in ENGINE if room_of(path) == room]
    graph = {path: {file for _, file in neighbours(path) if room_of(file) == room} for path in files}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" <- ".join(map(where, e.args[1])))


def test_doors_only_hand_on():
    """Imports and `__all__`; the package's own file says its version as well, and `__main__` calls."""
    for name in sorted(DOORS - {"__init__", "__main__"}):
        path = ROOT / "nvit" / f"{name}.py"
        if path.exists():
            rest = [n for n in ast.parse(path.read_text()).body if not isinstance(n, (ast.Import, ast.ImportFrom))]
            allowed = (ast.Expr, ast.Assign)
            assert all(isinstance(n, allowed) for n in rest), f"{where(path)} defines something"


def test_utils_knows_nobody():
    for path in ENGINE:
        if room_of(path) == "utils":
            outside = [name for name, file in neighbours(path) if room_of(file) != "utils"]
            assert not outside, f"{where(path)} imports {outside}"


def test_spec_knows_no_torch():
    assert not {n for n in ENGINE[ROOT / "nvit/spec.py"] if n.split(".")[0] in ("torch", "timm", "numpy")}


def test_host_names_stay_in_adapters():
    """timm's model and layer classes are known to adapters alone; its data, optimiser, factory serve everyone. A
    callback of transformers' Trainer knows that, and no model."""
    for path, names in ENGINE.items():
        if room_of(path) not in ("adapters", "integrations"):  # whose business other libraries are
            hosts = {
                n
                for n in names
                if n.startswith(("timm.layers", "transformers")) or (n.count(".") > 2 and n.startswith("timm.models."))
            }
            assert not hosts, f"{where(path)} imports {sorted(hosts)}"


def test_kernels_have_two_doors_and_processes_one():
    for path, names in ENGINE.items():
        if where(path) not in KERNEL_DOORS:
            assert "nvit_kernels" not in {n.split(".")[0] for n in names}, where(path)
        if room_of(path) != "parallel":
            assert not any(n.startswith("torch.distributed") for n in names), where(path)


def test_kernels_know_neither_the_engine_nor_hosts():
    """`fuse` swaps layers in timm's models."""
    for path, names in FILES.items():
        if path not in ENGINE:
            banned = {"nvit", "transformers"} | (set() if path.name == "fuse.py" else {"timm"})
            assert not {n.split(".")[0] for n in names} & banned, where(path)


def test_nobody_pickles_or_imports_benchmarks():
    for path, names in FILES.items():
        banned = {"pickle", "dill", "joblib", "shelve", "benchmarks", "tests"}
        assert not {n.split(".")[0] for n in names} & banned, where(path)


def test_files_are_short():
    lines = {where(p): len(p.read_text().splitlines()) for p in FILES}
    long = {name: n for name, n in lines.items() if n > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: {long}"
    assert statistics.median(lines.values()) <= MEDIAN_LINES


def test_the_checker_sees_relative_absolute_and_nested_imports(tmp_path, monkeypatch):
    file = tmp_path / "nvit" / "adapters" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..modules import A\nfrom . import y\ndef f():\n    import nvit.cli as c\n    from .. import masks\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imported(file) == {"nvit.modules.A", "nvit.adapters.y", "nvit.cli", "nvit.masks"}


def test_the_checker_finds_the_file_behind_a_name():
    assert file_of("nvit.latency.grid.Grid") == ROOT / "nvit/latency/grid.py"
    assert file_of("nvit.spec.KINDS") == ROOT / "nvit/spec.py"
    assert file_of("nvit.layers.keep_") == ROOT / "nvit/layers/__init__.py"
    assert file_of("nvit.layers.base") == ROOT / "nvit/layers/base.py"
    assert file_of("torch.nn") is None and file_of("nvit_kernels.plan") is None
