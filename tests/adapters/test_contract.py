"""The contract of adapters: every family has all of it, the engine asks nothing else, and blocks are blocks."""

import ast
import inspect
import re
from functools import partial
from pathlib import Path

import pytest

from nvit import adapters
from nvit.adapters import Adapter
from nvit.layers import prunable_layers
from nvit.structure.compact import compact
from tests.families import HOSTS
from tests.hosts import TINY_HOSTS, make, random_masks

ROOT = Path(__file__).parents[2]
METHODS = {name: f for name, f in inspect.getmembers(Adapter, inspect.isfunction)}
EVERY = HOSTS | {f"vit_{name}": partial(make, name) for name in TINY_HOSTS}


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_a_family_answers_as_the_contract_says(family):
    adapter = adapters.FAMILIES[family]
    assert isinstance(adapter, Adapter) and adapter.family == family
    for name, method in METHODS.items():
        mine = inspect.signature(getattr(type(adapter), name))
        assert list(mine.parameters.values()) == list(inspect.signature(method).parameters.values()), name
        assert mine.return_annotation == inspect.signature(method).return_annotation, name


@pytest.mark.parametrize("missing", sorted(Adapter.__abstractmethods__))
def test_an_adapter_without_one_of_them_cannot_be_made(missing):
    has = {name: method for name, method in METHODS.items() if name in Adapter.__abstractmethods__ - {missing}}
    found = {name: lambda self, *_: None for name in has}
    with pytest.raises(TypeError, match=missing):
        type("Partial", (Adapter,), found)()
    assert type("Whole", (Adapter,), found | {missing: lambda self, *_: None})()


def test_the_engine_asks_for_nothing_else_and_for_all_of_it():
    asked = set()
    call = re.compile(r"\b(?:adapter|adapters\.(?:find|of)\(\w+\)|family_of\(\w+\)|FAMILIES\[[^]]*\])\.([a-z_]+)")
    for file in (ROOT / "nvit").rglob("*.py"):
        if file.parent.name != "adapters":
            asked |= set(call.findall(file.read_text()))
    assert asked <= METHODS.keys(), "what the engine asks of an adapter is in its contract"
    inside = set().union(*(called_inside(file.read_text()) for file in (ROOT / "nvit" / "adapters").glob("*.py")))
    assert METHODS.keys() <= asked | inside, "what nobody asks is no part of it"


def called_inside(source: str) -> set[str]:
    """Methods called on something, but for a call from a method of that name: that only hands its own question on, to
    `super()` or to a host's adapter."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
            own = {function.name} if [a.arg for a in function.args.args][:1] == ["self"] else set()
            found |= {f.attr for f in calls if isinstance(f, ast.Attribute)} - own
    return found


def test_handing_a_question_on_is_not_asking():
    assert called_inside("def spec(self, m): return self.host(m).spec(m)") == {"host"}
    assert called_inside("def build(spec): return FAMILIES[spec.family].build(spec)") == {"build"}


@pytest.mark.parametrize("name", EVERY)
def test_blocks_hold_the_layers_of_their_widths_and_nothing_else_does(name):
    host = EVERY[name]()
    model = adapters.find(host).prepare(host)
    adapter, layers = adapters.of(model), prunable_layers(model)
    groups = adapter.groups(model)
    blocks, names = adapter.blocks(model), adapter.block_names(model)
    owned = [{g.name for g in groups if g.kind != "emb" and g.blocks == (i,)} for i in range(len(blocks))]
    assert set().union(*owned) == {g.name for g in groups if g.kind != "emb"}, "a block for every width"
    assert [model.get_submodule(n) for n in names] == blocks
    for prefix, mine in zip(names, owned, strict=True):
        inside = {n for n in layers if f"{n}.".startswith(f"{prefix}.")}
        assert len(mine) == 4
        for n, layer in layers.items():
            found = mine & set(layer.axes.values())
            assert not found or n in inside, f"{n} is of {found} but not in {prefix}"
        assert mine <= {group for n in inside for group in layers[n].axes.values()}
    assert adapter.block_names(compact(model, groups, random_masks(groups))) == names
