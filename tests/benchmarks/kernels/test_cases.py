"""Every op's cases and peers, and what they share."""

from importlib import import_module

import pytest
import torch

from benchmarks.harness import gate, relative_error
from benchmarks.kernels import mlp


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
