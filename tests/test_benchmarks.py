"""Every benchmark says what it measures; the one that decides nothing slow runs once."""

import copy
import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from benchmarks import gate_samples, paired, records, saliencies
from nvit import adapters
from nvit.masks import full_masks
from nvit.saliency import CRITERIA, Evidence, GateRecorder

NAMES = sorted(p.stem for p in Path(records.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    bench = importlib.import_module(f"benchmarks.{name}")
    if not hasattr(bench, "main"):
        pytest.skip("takes no arguments")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    from benchmarks import bench_decision

    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench_decision", "--model", "deit_tiny_patch16_224", "--rounds", "1"])
    threads = records.torch.get_num_threads()
    try:
        assert bench_decision.main() == 0
    finally:
        records.torch.set_num_threads(threads)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = (tmp_path / "decision_cpu.csv").read_text().splitlines()
    assert len(written) == len(printed) + 1 and printed[0]["units"] == 1 * 192 + 12 * (3 + 64 + 64 + 768)


def test_paired_bootstrap_agrees_with_the_normal_interval():
    draws = np.random.default_rng(0)
    shared = draws.normal(size=2000)  # hard for both: it has to cancel
    a, b = shared + draws.normal(0.1, 0.2, size=2000), shared + draws.normal(0.0, 0.2, size=2000)
    found = paired.paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / 2000**0.5
    assert found.mean == pytest.approx((a - b).mean()) and found.significant and found.better == 1
    # 10 000 resamples know a 2.5 % quantile to about 2 % of a half width.
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_paired_bootstrap_of_the_same_answers_says_nothing():
    right = np.arange(50) % 3 == 0
    found = paired.paired_bootstrap(right, right)
    assert (found.mean, found.low, found.high, found.better) == (0, 0, 0, 0.5) and not found.significant
    with pytest.raises(ValueError, match="the same images in both"):
        paired.paired_bootstrap(right, right[1:])


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
