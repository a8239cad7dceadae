"""Every op's cases and peers, and what they share."""

from importlib import import_module

import pytest
import torch

from benchmarks.harness import gate, relative_error
from benchmarks.kernels import merge_cases, mlp


@pytest.mark.parametrize("op", ["group_dot", "kept_layer_norm", "attention", "mlp"])
def test_every_benchmark_declares_its_cases_and_peers(op):
    cases = import_module(f"benchmarks.kernels.{op}").cases()
    assert cases and all(
        any(p.startswith("nvit") for p in case.providers) and len(case.providers) >= 3 for case in cases
    )


def test_gradients_of_cut_weights_are_compared_among_zeros(monkeypatch):
    for size, name in ((8, "WIDTH"), (32, "HIDDEN")):
        monkeypatch.setattr(mlp, name, size * 4)
    monkeypatch.setattr(mlp, "KEEP", (128, 64))
    for case in mlp.cases():
        right, _ = gate(case)
        assert mlp.SLICED in right, case.name
    step = right[mlp.SLICED]
    assert relative_error(step.comparable(), case.exact()) < 1e-5
    assert [tuple(t.shape) for t in step()][1:] == [(16, 8), (16,), (8, 16), (8,)], "only kept units are timed"
    assert torch.equal(step()[4], step.comparable()[4])


def test_merges_are_compared_in_any_order_and_each_has_its_block(monkeypatch):
    monkeypatch.setattr(merge_cases, "SHAPES", {"small": (2, 96, 3)})
    block, *merges = merge_cases.cases()
    assert gate(block)[0] and [case.name.endswith(" small b2") for case in merges] == [True] * 3
    for case in merges:
        right, rows = gate(case)
        assert set(right) >= {"torch"} | ({"ToMe's recipe"} if "sizes" not in case.name else set()), rows
        assert merge_cases.OURS in case.providers and len(case.providers) >= 3
