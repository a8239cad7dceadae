"""Mean Hessian traces of every structure: against the whole Hessian, family by family, and the command."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from nvit import adapters, spec
from nvit.analysis.sensitivity import STRUCTURES, Weights, rows_of, traces, weights_of
from nvit.cli import main as cli
from tests.hosts import images, labels, prepared

STREAM = {"plain": 48, "deit_distilled": 48, "one_head": 16}


def batch_of(model, count, seed):
    return images(model, count, seed=seed), labels(model, count, seed=seed)


@pytest.mark.parametrize("host", STREAM)
def test_structures_are_the_papers_and_hold_every_weight_of_a_block_once(host):
    model, groups = prepared(host)
    found = weights_of(model, groups)
    assert [(w.block, w.structure) for w in found] == [(b, s) for b in range(2) for s in STRUCTURES]
    block = adapters.find(model).blocks(model)[1]
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert sum(w.count() for w in found if w.block == 1) == matrices
    seen = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for w in found:
        for s in w.slices:
            s.of(seen[s.name]).add_(1)
    q, k, v = (w for w in found[:3])
    assert [s.slices[0].rows for s in (q, k, v)] == [(i * STREAM[host], (i + 1) * STREAM[host]) for i in range(3)]
    assert all((seen[n] == 1).all() for n, p in block.named_parameters(prefix="blocks.1") if p.ndim == 2)


def test_a_gated_mlp_has_two_matrices_in_its_fc1():
    slices = [
        spec.Slice("gate.weight", (8, 4), 0),
        spec.Slice("up.weight", (8, 4), 0),
        spec.Slice("up.bias", (8,), 0),
        spec.Slice("down.weight", (4, 8), 1, scored=True),
    ]
    model = torch.nn.ModuleDict(
        {"gate": torch.nn.Linear(4, 8), "up": torch.nn.Linear(4, 8), "down": torch.nn.Linear(8, 4)}
    )
    found = weights_of(model, [spec.Group("mlp", "mlp", 8, 1, tuple(slices), (0,))])
    assert [(w.structure, w.count()) for w in found] == [("FC1", 64), ("FC2", 32)]


@pytest.fixture(scope="module")
@sdpa_kernel(SDPBackend.MATH)
def exact():
    """A tiny model, its images, and by structure the exact traces of the Hessian and of Gauss-Newton over the number of
    weights, one weight and one image at a time."""
    model, groups = prepared("one_head", torch.float64)
    x, y = batch_of(model, 3, 0)
    structures = [w for w in weights_of(model, groups) if w.structure in ("Q", "V", "FC2") and w.block == 1]
    found = {"trace": [], "gauss_newton": []}
    out = adapters.find(model).logits(model, x).mean
    p = out.detach().softmax(-1)
    jacobians = {}
    for w in structures:
        (s,) = w.slices
        weight = model.get_parameter(s.name)
        (g,) = torch.autograd.grad(F.cross_entropy(out, y), weight, create_graph=True)
        flat = s.of(g).flatten()
        second = [s.of(torch.autograd.grad(e, weight, retain_graph=True)[0]).flatten()[i] for i, e in enumerate(flat)]
        found["trace"].append(float(torch.stack(second).mean()))
        if s.name not in jacobians:
            rows = [torch.autograd.grad(o, weight, retain_graph=True)[0] for o in out.flatten()]
            jacobians[s.name] = torch.stack(rows).view(*out.shape, *weight.shape)
        total = 0.0
        for j, q in zip(jacobians[s.name], p, strict=True):
            j = torch.stack([s.of(row).flatten() for row in j])
            total += float((j * ((torch.diag(q) - torch.outer(q, q)) @ j)).sum())
        found["gauss_newton"].append(total / len(x) / w.count())
    return model, structures, (x, y), found


@pytest.mark.parametrize("key", ["trace", "gauss_newton"])
def test_estimates_are_unbiased(exact, key):
    """Many estimates of one batch differ from the exact trace by what their own spread allows."""
    model, structures, batch, expected = exact
    found = traces(model, structures, [batch] * 150, seed=1)[key]
    off = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - torch.tensor(expected[key])).abs() < 4 * off).all()
    assert (off < 0.25 * torch.tensor(expected[key]).abs()).any(), "an estimate this wide would prove nothing"


def test_probes_are_averaged_and_draws_come_from_the_seed(exact):
    model, structures, batch, _ = exact
    one, two = (traces(model, structures, [batch] * 12, probes=n, seed=3) for n in (1, 8))
    assert two["trace"].std(0).mean() < 0.7 * one["trace"].std(0).mean()
    assert torch.equal(traces(model, structures, [batch] * 12, seed=3)["trace"], one["trace"])
    assert not torch.equal(traces(model, structures, [batch] * 12, seed=4)["trace"], one["trace"])
    assert all(p.grad is None for p in model.parameters())


def test_rows_have_standard_errors_and_structures_over_all_blocks_weigh_by_their_number():
    def weights(structure, block, rows):
        return Weights(structure, block, (spec.Slice("w", (rows, 2), 0),))

    structures = [weights("Q", 0, 1), weights("Q", 1, 3), weights("K", 0, 1)]
    values = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]], dtype=torch.float64)
    rows = rows_of(structures, {"trace": values})
    assert rows[0] == {"structure": "Q", "block": 0, "weights": 2, "trace": 2.0, "trace_se": pytest.approx(1.0)}
    assert rows[3] == {"structure": "Q", "block": "all", "weights": 8, "trace": 2.0, "trace_se": pytest.approx(0.25)}
    assert rows_of(structures, {"trace": values[:1]})[0]["trace_se"] is None


def test_a_task_without_labels_is_refused():
    model, groups = prepared("no_classifier")
    with pytest.raises(ValueError, match="task features has no loss of its own; sensitivity needs labels"):
        traces(model, weights_of(model, groups), [])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_other_families_have_the_same_structures(name):
    import timm

    depth = {"depths": (1, 1)} if name.startswith("swin") else {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, **depth)
    model = adapters.find(model).prepare(model)
    found = weights_of(model, adapters.find(model).groups(model))
    blocks = adapters.find(model).blocks(model)
    assert {(w.block, w.structure) for w in found} == {(b, s) for b in range(len(blocks)) for s in STRUCTURES}


def test_command_on_the_digits(tmp_path, capsys):
    args = ["--samples", "64", "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["analyze", "sensitivity", "digits", *args]) == 0
    shown, found = capsys.readouterr(), json.loads((tmp_path / "result.json").read_text())
    assert "FC2" in shown.out and "Gauss-Newton" in shown.out and "sensitivity" in shown.err
    assert [r["structure"] for r in found["structures"]] == list(STRUCTURES) and found["images"] == 64
    by = {r["structure"]: r for r in found["structures"]}
    assert by["Q"]["latency_per_unit"] == by["K"]["latency_per_unit"] != by["FC1"]["latency_per_unit"] > 0
    assert all(r["gauss_newton"] > 0 and r["gauss_newton_se"] > 0 for r in found["structures"])
    with (tmp_path / "sensitivity.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6 * 4 + 6 and Image.open(tmp_path / "sensitivity.png").size[0] > 500


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--samples", "0"], "samples is 0; it must be at least 1"),
        (["--samples", "20"], "samples is 20; a standard error needs two batches, 32 images"),
    ],
)
def test_wrong_input_is_one_clear_line(args, says, capsys):
    assert cli.main(["analyze", "sensitivity", "digits", "--device", "cpu", *args]) == 2
    assert says in capsys.readouterr().err
