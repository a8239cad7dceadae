"""The engine asks layers what they declare, never which class they are or what they keep to themselves."""

import ast
from pathlib import Path

import pytest

from nvit import layers
from nvit.layers import Prunable

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for path in sorted((ROOT / "nvit").rglob("*.py"))
    if path.relative_to(ROOT / "nvit").parts[0] not in ("layers", "adapters")
]
CLASSES = {n for n, c in vars(layers).items() if isinstance(c, type) and issubclass(c, Prunable) and c is not Prunable}
PRIVATE = {n for c in vars(layers).values() if isinstance(c, type) for n in vars(c) if n[0] == "_" and n[:2] != "__"}


def asked(tree: ast.AST) -> set[str]:
    """What `isinstance` and `hasattr` ask for, torch's own classes aside, and private attributes read of another."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr", "getattr"):
            asks = [n for n in ast.walk(node.args[1]) if getattr(getattr(n, "value", None), "id", "") != "nn"]
            found |= {getattr(n, "id", getattr(n, "attr", getattr(n, "value", None))) for n in asks}
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" and getattr(node.value, "id", "") != "self":
            found.add(node.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_asks_for_a_layers_class_or_its_insides(path):
    hidden = (CLASSES | PRIVATE) & asked(ast.parse(path.read_text()))
    assert not hidden, f"{path.name} asks for {', '.join(sorted(hidden))}"


def test_what_would_be_caught():
    code = "isinstance(m, (Attention, nn.Linear)); m._watch(); hasattr(m, '_bias'); hasattr(m, 'axes'); self._index()"
    assert asked(ast.parse(code)) & (CLASSES | PRIVATE) == {"Attention", "_watch", "_bias"}
