"""Torch-Pruning as the benchmarks drive it, and the figure that sets it beside ours."""

import csv

import pytest
import timm
import torch

from benchmarks.accuracy import refit_peers
from benchmarks.engine.torch_pruning_vit import finish, narrowed, pruner_of, twin_of
from nvit.analysis.evaluate import macs

INPUT = (3, 32, 32)


@pytest.fixture(scope="module")
def tp():
    return pytest.importorskip("torch_pruning", reason="torch-pruning, an extra for the benchmarks alone, is missing")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=48).eval()
    torch.nn.functional.cross_entropy(model(torch.randn(4, *INPUT)), torch.arange(4)).backward()
    return model


def test_nothing_removed_is_the_dense_model(tp, dense):
    twin, x = twin_of(dense), torch.randn(2, *INPUT)
    pruner = pruner_of(twin, 0.0, input_size=INPUT)
    pruner.step()
    torch.testing.assert_close(finish(twin, pruner)(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mlp_only", [True, False])
def test_torch_pruning_meets_the_share_of_macs(tp, dense, mlp_only):
    before = macs(dense, INPUT)
    importance = tp.importance.GroupTaylorImportance()
    small, kept = narrowed(dense, 0.8, importance, mlp_only=mlp_only, input_size=INPUT, bisections=9)
    # One embedding channel of 48 takes at most two in 48 of the work with it.
    assert 0.8 <= kept < 0.8 + 2 / 48 and kept == macs(small, INPUT) / before
    assert small(torch.randn(1, *INPUT)).shape == (1, 5)
    hidden = [b.mlp.fc1.out_features for b in small.blocks]
    others = [small.embed_dim == 48, *(b.attn.qkv.weight.shape == (144, 48) for b in small.blocks)]
    assert sum(hidden) < 2 * 192 and (all(others) or not mlp_only)
    assert macs(dense, INPUT) == before, "the model given has changed"


def write(path, rows):
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)


def test_the_figure_reads_accuracy_and_latency(tmp_path):
    mine = {"case": "mlp", "method": "ours", "target": 0.7}
    other = {"case": "all", "method": "Torch-Pruning, Taylor", "target": 0.8}
    write(
        tmp_path / "refit_peers_cpu.csv",
        [{"case": "dense", "top1": 80}, mine | {"macs": 0.7, "top1": 60}, other | {"macs": 0.8, "top1": 50}],
    )
    whole = {"macs": 1.0, "top1": 80.0, "latency": 1.0, "latency_low": 1.0, "latency_high": 1.0}
    alone = {
        "ours": [{"case": "mlp"} | whole, {"case": "mlp", "macs": 0.7, "top1": 60.0}],
        "Torch-Pruning, Taylor": [{"case": "all"} | whole, {"case": "all", "macs": 0.8, "top1": 50.0}],
    }
    assert refit_peers.points(tmp_path) == alone
    ours = {"case": "global", "criterion": "remaining", "macs": 0.5, "target": 0.5}
    write(
        tmp_path / "refit_global_cpu.csv",
        [
            {"case": "dense", "top1": 80},
            ours | {"refit": False, "top1": 20},
            ours | {"refit": True, "top1": 40},
            ours | {"criterion": "fisher", "refit": True, "top1": 1},
        ],
    )
    latency = {"latency": 0.55, "latency_low": 0.54, "latency_high": 0.57}
    write(tmp_path / "refit_latency_cpu.csv", [{"case": "all", "method": "ours", "target": 0.5} | latency])
    found = refit_peers.points(tmp_path)
    assert list(found) == ["ours, refitted", "ours", "Torch-Pruning, Taylor"]
    half = {"case": "all", "macs": 0.5} | latency
    assert found["ours"][2:] == [{"case": "all"} | whole, half | {"top1": 20.0}]
    assert found["ours, refitted"] == [{"case": "all"} | whole, half | {"top1": 40.0}], "a refit leaves the widths"
    assert refit_peers.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
