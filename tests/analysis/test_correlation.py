"""Saliency against the true loss change: bundles, masked losses, rank correlations, and the command."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nvit.analysis.correlation import Bundle, loss_changes, propose, rank_correlations, rows_of, saliencies
from nvit.calibration.gauss_newton import GateProducts
from nvit.calibration.statistics import gather_statistics
from nvit.cli import main as cli
from nvit.config import PruneConfig
from nvit.criteria.curvature import curvature_loss
from nvit.criteria.registry import CRITERIA
from nvit.criteria.remaining import remaining_loss
from nvit.structure.masks import full_masks
from tests import references
from tests.hosts import images, labels, make, prepared


def batches_of(model, sizes=(3, 2)):
    return [(images(model, n, seed=n), labels(model, n, seed=n)) for n in sizes]


def test_bundles_are_neighbours_in_their_criterions_order():
    _, groups = prepared("plain")
    generator = torch.Generator().manual_seed(0)
    scores = {name: {g.name: torch.rand(g.size, generator=generator) for g in groups} for name in ("hessian", "abs")}
    bundles = propose(scores, groups, count=4)
    for b in bundles:
        order = scores[b.proposed_by][b.group.name].argsort().tolist()
        places = sorted(order.index(u) for u in b.units)
        assert places == list(range(places[0], places[0] + len(b.units))), "neighbours"
        assert len(b.units) < b.group.size
        first = b.group.size % b.group.multiple or b.group.multiple
        assert len(b.units) == (first if places[0] == 0 else b.group.multiple)
    by_group = {g.name: [b.proposed_by for b in bundles if b.group is g] for g in groups}
    # 96 hidden units make six bundles of 16: two from each criterion. 3 heads leave as 1 + 2.
    assert by_group["blocks.0.mlp"] == ["hessian", "hessian", "abs", "abs"]
    assert by_group["blocks.1.heads"] == ["hessian", "hessian", "abs", "abs"]


def test_a_group_of_one_bundle_has_none_to_remove():
    _, groups = prepared("one_head")
    scores = {"abs": {g.name: torch.ones(g.size) for g in groups}}
    kinds = {b.group.kind for b in propose(scores, groups, count=8)}
    assert kinds == {"qk_dim", "v_dim", "mlp"}, "one head and 16 channels are a bundle each, which never leaves"


@pytest.mark.parametrize("host", ["plain", "deit_distilled"])
def test_loss_change_equals_the_straight_line_masked_model(host):
    model, groups = prepared(host, torch.float64)
    host_model, batches = make(host, torch.float64), batches_of(model)
    bundles = [Bundle(g, tuple(range(1, 1 + g.size // 3)), "abs") for g in groups]
    before = model(batches[0][0]).detach()
    found = loss_changes(model, groups, bundles, batches)

    def loss(masks):
        total = sum(
            F.cross_entropy(references.masked_vit(host_model, x, masks), y, reduction="sum") for x, y in batches
        )
        return total.item() / 5

    dense = loss(full_masks(groups))
    for b, change in zip(bundles, found, strict=True):
        masks = full_masks(groups)
        masks[b.group.name][list(b.units)] = False
        assert change == pytest.approx(loss(masks) - dense, rel=1e-9, abs=1e-12), b.group.name
    assert torch.equal(model(batches[0][0]), before), "the model is left as it was"


def test_saliencies_are_those_of_the_criteria():
    """The mean over batches of what each criterion says; here of the square of a batch's gate gradient."""
    model, groups = prepared("plain", torch.float64)
    batches = batches_of(model)
    found = saliencies(model, batches, ["hessian", "magnitude"], PruneConfig(train=False))
    expected = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        params = dict(model.named_parameters())
        each = references.hessian(params, {n: p.grad for n, p in params.items()}, 2, 3, 16)
        expected = {n: e + each[n] / len(batches) for n, e in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found["hessian"][name], value, rtol=1e-8, atol=1e-10 * float(value.abs().max()))
    assert found.keys() == {"hessian", "magnitude"} <= CRITERIA.keys()


def test_every_criterion_can_be_compared():
    model, groups = prepared("deit_distilled")
    before, batches = {n: p.clone() for n, p in model.named_parameters()}, batches_of(model)
    found = saliencies(model, batches, list(CRITERIA), PruneConfig(train=False))
    assert list(found) == list(CRITERIA)
    for name, scores in found.items():
        assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in groups}, name
    gates = GateProducts()
    statistics = gather_statistics(model, [x for x, _ in batches], gates=gates)
    for name, exact in (
        ("curvature", curvature_loss(model, groups, full_masks(groups), statistics, gates)),
        ("remaining", remaining_loss(model, groups, full_masks(groups), statistics)),
    ):
        assert all(torch.equal(found[name][n], s) for n, s in exact.items()), name
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())


def test_rank_correlations_of_known_cases():
    rows = [
        {"kind": kind, "up": float(s), "down": float(-s), "flat": 1.0, "loss_change": float(factor * s**3)}
        for kind, factor in (("mlp", 1), ("qk_dim", 100))
        for s in range(1, 6)
    ]
    found = {(r["criterion"], r["kind"]): r for r in rank_correlations(rows, ["up", "down", "flat"])}
    assert found["up", "mlp"]["spearman"] == pytest.approx(1) == -found["down", "qk_dim"]["spearman"]
    assert found["flat", "all"]["spearman"] is None and ("up", "emb") not in found
    assert 0 < found["up", "all"]["spearman"] < 1, "kinds on different scales"
    scale = found["up", "qk_dim"]["loss_change_per_saliency"] / found["up", "mlp"]["loss_change_per_saliency"]
    assert scale == pytest.approx(100)


def test_rows_add_up_the_units_of_a_bundle():
    _, groups = prepared("plain")
    g = groups[-1]
    scores = {"abs": {g.name: torch.arange(g.size)}}
    (row,) = rows_of([Bundle(g, (1, 4), "abs")], scores, [0.5])
    assert row == {
        "group": g.name,
        "kind": "mlp",
        "proposed_by": "abs",
        "units": 2,
        "abs": 5.0,
        "loss_change": 0.5,
    }


def test_command_on_the_digits(tmp_path, capsys):
    args = ["--criterion", "abs", "random", "curvature", "--bundles", "4", "--batches", "2", "--device", "cpu"]
    assert cli.main(["analyze", "correlation", "digits", *args, "--out", str(tmp_path)]) == 0
    shown, found = capsys.readouterr(), json.loads((tmp_path / "result.json").read_text())
    assert "abs, all" in shown.out and "remove" in shown.err
    with (tmp_path / "correlation.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == found["bundles"] and {r["kind"] for r in rows} == {"emb", "heads", "qk_dim", "v_dim", "mlp"}
    rho = {(r["criterion"], r["kind"]): r["spearman"] for r in found["correlations"]}
    for name in ("abs", "curvature"):
        assert rho[name, "all"] > max(0.3, rho["random", "all"]), "a trained model's saliency foretells its loss"
    assert Image.open(tmp_path / "correlation.png").size[0] > 500


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["correlation", "digits", "--bundles", "0"], 2, "bundles is 0; it must be at least 1"),
        (["correlation", "digits", "--only", "mpl"], 2, "did you mean 'mlp'"),
        (["correlation"], 2, "MODEL is missing"),
        ([], 2, "usage: nvit analyze {widths,attention,correlation,latency,rule,sensitivity} MODEL"),
    ],
)
def test_wrong_input_is_one_clear_line(args, code, says, capsys):
    assert cli.main(["analyze", *args]) == code
    assert says in capsys.readouterr().err
