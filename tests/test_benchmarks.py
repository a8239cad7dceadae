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

from benchmarks import gate_samples, logit_refit, paired, records, saliencies
from nvit import adapters
from nvit.calibration.statistics import watch
from nvit.criteria.base import Evidence
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.structure.masks import apply_, full_masks
from tests.hosts import images, prepared

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


@pytest.mark.parametrize("host", ["plain", "no_qkv_bias"])
def test_logit_refit_brings_logits_nearer_turn_by_turn_and_changes_nothing_where_nothing_left(host):
    model, groups = prepared(host)
    dense = copy.deepcopy(model)
    xs = [images(model, 6, seed=s) for s in range(5)]
    seen = watch(dense, xs)
    masks = full_masks(groups)
    errors = []
    for narrow, turns in ((False, 1), (True, 0), (True, 1), (True, 6)):
        model = copy.deepcopy(dense)
        if narrow:
            for g in groups:
                if g.kind == "qk_dim":
                    masks[g.name][: g.size // 2] = False
        apply_(model, groups, masks)
        before = copy.deepcopy(model)
        if turns:
            logit_refit.refit_logits_(model, dense, groups, xs, seen, turns)
        if not narrow:
            for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
            continue
        changed = [n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if not p.equal(q)]
        assert all(".attn.qkv." in n for n in changed)
        errors.append(_first_logits_error(model, dense, xs))
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1]


def _first_logits_error(model, dense, xs) -> float:
    """Of the first block's logits, which have the dense model's inputs, about the mean over keys."""
    found = []
    for m in (model, dense):
        logits = []

        def read(layer, args, _, logits=logits):
            heads, dims, _ = layer.kept
            rows = layer.q_rows
            w = layer.qkv.weight if rows is None else layer.qkv.weight[rows]
            b = layer.qkv.bias if rows is None or layer.qkv.bias is None else layer.qkv.bias[rows]
            q, k = (
                torch.nn.functional.linear(args[0], w, b)[..., : 2 * heads * dims]
                .unflatten(-1, (2, heads, dims))
                .unbind(2)
            )
            z = q.movedim(2, 1) @ k.movedim(2, 1).mT
            logits.append(z - z.mean(-1, keepdim=True))

        hook = m.blocks[0].attn.register_forward_hook(read)
        with torch.no_grad():
            for x in xs:
                adapters.find(m).logits(m, x)
        hook.remove()
        found.append(torch.cat(logits))
    return float((found[0] - found[1]).square().mean())
