"""Recorded gate gradients are the engine's own, and saliencies of them what they are called."""

import copy
import itertools

import timm
import torch

from benchmarks.accuracy import gate_samples, saliencies
from nvit import adapters
from nvit.criteria.base import Evidence
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.structure.masks import full_masks


def test_recorded_gates_are_those_of_the_engine():
    """Every kind's gate where its units leave, and `fisher` of them; the probe squares to the softmax's covariance."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    samples = [(torch.randn(3, 32, 32), i) for i in range(3)]
    found = gate_samples.record(copy.deepcopy(model), samples, lambda done: None)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    images, labels = torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
    with GateRecorder(model, groups, full_masks(groups)) as recorder:
        torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    expected = recorder.pop()
    for g in groups:
        got = saliencies.gates(found, g.kind, g.blocks[0])
        torch.testing.assert_close(got, expected[g.name], rtol=1e-3, atol=1e-5 * float(expected[g.name].abs().max()))
    name = "blocks.3.v_dim"
    exact = CRITERIA["fisher"].score(
        [g for g in groups if g.name == name], Evidence({}, {}, {name: expected[name] / 3})
    )
    theirs = CRITERIA["fisher"].scores(exact)[name]
    torch.testing.assert_close(saliencies.score(found, "v_dim", "leave", "fisher")[name], theirs, rtol=1e-3, atol=1e-9)


def test_probes_have_the_covariance_of_the_softmax():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    v = gate_samples.probe(p.expand(40_000, -1))
    # Products are below 1, so that the mean of 40 000 has a standard error below 0.005.
    torch.testing.assert_close(v.T @ v / len(v), p.diag() - p[:, None] * p, rtol=0, atol=0.02)


def test_expected_hessian_is_the_mean_over_all_batches():
    g = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    batches = [g[list(b)].mean(0).square() for b in itertools.combinations(range(6), 2)]
    torch.testing.assert_close(saliencies.expected_batch_squares(g, 2), sum(batches) / len(batches))
    torch.testing.assert_close(saliencies.expected_batch_squares(g, 6), g.mean(0).square())
