"""Imports point one way, so that every file can be read with only those before it in mind."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"progress": set(), "files": set(), "report": {"files"}}
"""Helpers that anyone may import, and what they import themselves."""
ORDER = [
    {"spec"},
    {"functional", "grid", "memory", "taps"},
    {"modules"},
    {"adapters"},
    {"masks"},
    {"saliency", "latency", "moments", "replay"},
    {"curvature"},
    {"selection", "refit", "rotation"},
    {"snapshot"},
    {"config", "distributed", "analysis", "zoo"},
    {"data", "distill", "evaluate"},
    {"training", "budget", "pruner"},
    {"scoring"},
    {"finetune", "oneshot", "export", "sparse24"},
    {"run"},
    {"inputs", "correlation"},
    {"jobs"},
    {"cli", "about"},
    {"__main__"},
]
"""A file imports from lines above its own."""


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


def module_of(dotted: str) -> str | None:
    """`nvit.masks.Masks` -> `masks`."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "nvit" and len(parts) > 1 else None


FILES = {p: imported(p) for folder in ("nvit", "nvit_kernels") for p in sorted((ROOT / folder).rglob("*.py"))}
ENGINE = {p: names for p, names in FILES.items() if p.parts[len(ROOT.parts)] == "nvit" and p.name != "__init__.py"}
ENGINE |= {p: names for p, names in FILES.items() if p.parent.name == "adapters"}


def own(path: Path) -> str:
    return path.relative_to(ROOT / "nvit").with_suffix("").parts[0]


def level(name: str) -> int:
    return next((i for i, names in enumerate(ORDER) if name in names), len(ORDER))


def test_every_file_has_its_place():
    assert {own(p) for p in ENGINE} <= set().union(*ORDER, LEAVES)
    assert len(ENGINE) > 15 and any(FILES.values())


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    mine = own(path)
    theirs = {m for m in map(module_of, ENGINE[path]) if m and m != mine}
    if mine in LEAVES:
        assert theirs <= LEAVES[mine], f"{mine} is a leaf"
        return
    package_itself = {m for m in theirs if m.startswith("__version__")}
    late = {m for m in theirs - LEAVES.keys() - package_itself if level(m) >= level(mine)}
    assert not late, f"{mine} imports {sorted(late)}, which come later"


def test_spec_knows_no_torch():
    assert not {n for n in ENGINE[ROOT / "nvit/spec.py"] if n.split(".")[0] in ("torch", "timm", "numpy")}


def test_host_names_stay_in_adapters():
    """timm's model and layer classes are known to adapters alone; its data, optimiser, factory serve everyone."""
    for path, names in ENGINE.items():
        if own(path) != "adapters":
            assert not {
                n
                for n in names
                if n.startswith(("timm.layers", "transformers")) or (n.count(".") > 2 and n.startswith("timm.models."))
            }, path


def test_one_door_each():
    for path, names in FILES.items():
        tops = {n.split(".")[0] for n in names}
        where = str(path.relative_to(ROOT))
        assert "benchmarks" not in tops and "tests" not in tops, where
        if where.startswith("nvit_kernels"):
            hosts = {"transformers"} if path.name == "fuse.py" else {"timm", "transformers"}
            assert not tops & ({"nvit"} | hosts), where
        elif path.name not in ("functional.py", "sparse24.py"):
            assert "nvit_kernels" not in tops, where
        if path.name != "distributed.py":
            assert not any(n.startswith("torch.distributed") for n in names), where
        assert not tops & {"pickle", "dill", "joblib", "shelve"}, where


def test_the_checker_sees_relative_absolute_and_nested_imports(tmp_path, monkeypatch):
    file = tmp_path / "nvit" / "adapters" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ..modules import A\nfrom . import y\ndef f():\n    import nvit.cli as c\n    from .. import masks\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imported(file) == {"nvit.modules.A", "nvit.adapters.y", "nvit.cli", "nvit.masks"}
