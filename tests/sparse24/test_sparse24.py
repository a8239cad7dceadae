"""2:4 in the engine: order without effect, masks that are 2:4, snapshots that say so, the command."""

import json

import pytest
import torch

import nvit
from nvit import snapshot, sparse24
from nvit.cli import main as cli
from nvit_kernels.sparse24 import mask_2to4
from tests.hosts import images, prepared


def digits(dtype=torch.float32):
    torch.manual_seed(0)
    return nvit.load(nvit.BUNDLED).to(dtype), torch.randn(5, 1, 8, 8, dtype=dtype)


def is_2to4(weight):
    return int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2


def test_channel_order_keeps_more_and_changes_nothing():
    model, x = digits(torch.float64)
    before, weights = model(x).detach(), {n: p.weight.clone() for n, p in sparse24.projections(model).items()}
    rows = sparse24.permute_(model, seconds=1.0)
    assert len(rows) == 8 and all(r["kept_after"] > r["kept_before"] for r in rows)
    assert not torch.equal(weights["blocks.0.mlp.fc2.weight"], model.blocks[0].mlp.fc2.weight)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-9 * float(before.abs().max()))


def test_masks_keep_the_two_largest_of_four():
    model, _ = digits()
    masks = sparse24.masks_2to4(model)
    assert len(masks) == 16
    for name, mask in masks.items():
        groups = sparse24.projections(model)[name].weight.detach().abs().unflatten(1, (-1, 4))
        kept = mask.unflatten(1, (-1, 4))
        assert bool((kept.sum(-1) == 2).all())
        torch.testing.assert_close((groups * kept).sum(-1), groups.topk(2, -1).values.sum(-1))


def test_a_sparse_snapshot_says_so_and_reloads_equal(tmp_path):
    model, x = digits()
    masks = sparse24.masks_2to4(model)
    sparse24.apply_masks_(model, masks)
    model.sparse24 = tuple(masks)
    snapshot.save(tmp_path / "s", model)
    again = nvit.load(tmp_path / "s")
    assert again.sparse24 == tuple(masks)
    assert torch.equal(again(x), model(x))


def test_a_snapshot_that_is_not_2to4_as_listed_is_refused(tmp_path):
    model, _ = digits()
    model.sparse24 = ("blocks.0.mlp.fc1.weight",)
    snapshot.save(tmp_path / "s", model)
    with pytest.raises(ValueError, match=r"fc1\.weight is listed as 2:4 sparse but keeps more than two of four"):
        nvit.load(tmp_path / "s")


def test_projections_that_do_not_fit_stay_dense_with_a_reason():
    linear = torch.nn.Linear(24, 32)
    choice = sparse24.choose("w", linear, 8)
    assert choice.backend == "dense" and "multiples of 16" in choice.why and not choice.masked


def test_without_sparse_tensor_cores_nothing_is_claimed():
    offered, why = sparse24.backends(torch.device("cpu"), torch.float16)
    assert offered == () and "cpu" in why
    choice = sparse24.choose("w", torch.nn.Linear(64, 32), 8)
    assert choice.masked and choice.sparse_ms is None


def test_sparsify_on_the_command_line(tmp_path):
    out = tmp_path / "out"
    args = ["sparsify", "digits", "--epochs", "0.1", "--permute-seconds", "1", "--device", "cpu", "--out", str(out)]
    args += ["--log", "csv"]
    assert cli.main(args) == 0
    assert "finetune," in (tmp_path / "out_log" / "log.csv").read_text()
    found = json.loads((out / "result.json").read_text())
    assert found["sparse_layers"] == 16 and found["top1_dense"] > found["top1_sparse"] > 50
    model = nvit.load(out)
    assert all(is_2to4(p.weight) for p in sparse24.projections(model).values())
    assert cli.main(args) == 1, "a snapshot is not overwritten"


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torch_unpacks_what_we_compressed():
    weight = torch.randn(64, 128, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    weight *= mask_2to4(weight)
    assert torch.equal(sparse24.compressed(weight, sparse24.CUTLASS).to_dense(), weight)


@pytest.mark.gpu
def test_sparse_tensor_cores_compute_the_same(tmp_path):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("needs a GPU with sparse tensor cores")
    torch.manual_seed(0)
    for backend in sparse24.backends(torch.device("cuda"), torch.float16)[0]:
        weight = torch.randn(384, 1536, device="cuda", dtype=torch.float16)
        weight *= mask_2to4(weight)
        x = torch.randn(1576, 1536, device="cuda", dtype=torch.float16)
        exact = x.double() @ weight.double().T
        got = torch.nn.functional.linear(x, sparse24.compressed(weight, backend)).double()
        assert float((got - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("host", ["swiglu_packed", "swiglu", "glu"])
def test_permuting_a_gated_mlp_moves_gate_and_value_together(host):
    model, _ = prepared(host, embed_dim=32, num_heads=2, mlp_ratio=2.0)
    x = images(model)
    with torch.no_grad():
        before = model(x)
        rows = sparse24.permute_(model, seconds=1.0)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert len(rows) == 4 and any(r["kept_after"] > r["kept_before"] for r in rows)
