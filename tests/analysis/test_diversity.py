"""How different heads are: attention maps and outputs against straight lines, families, and the command."""

import csv
import json

import pytest
import torch
from PIL import Image

from nvit import adapters
from nvit.analysis.diversity import _map_distances, _Products, head_diversity
from nvit.calibration.capture import capture
from nvit.cli import main as cli
from nvit.layers import Attention, keep_, prunable_layers
from nvit.structure.masks import full_masks
from tests.hosts import images, make, prepared


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "qk_norm"])
def test_maps_are_the_softmax_that_the_host_computes(host):
    """timm's unfused attention, block by block, from the same tokens."""
    model, _ = prepared(host, torch.float64)
    dense, x = make(host, torch.float64).eval(), images(model, 2)
    seen = {}
    names = [n for n, m in prunable_layers(model).items() if isinstance(m, Attention)]
    with (
        torch.no_grad(),
        capture(model, [(n, "maps") for n in names], lambda p, a, _: seen.update({p: a}), gradients=0),
    ):
        model(x)

    def softmax_of(attn, tokens):
        qkv = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
        return (attn.scale * q @ k.transpose(-2, -1)).softmax(-1)

    expected = {}
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda attn, args, name=name: expected.update({(name, "maps"): softmax_of(attn, args[0])})
        )
    with torch.no_grad():
        dense(x)
    assert seen.keys() == expected.keys() and len(seen) == 2
    for place, maps in seen.items():
        torch.testing.assert_close(maps, expected[place], rtol=1e-9, atol=1e-12)


def test_distances_of_maps_are_total_variations():
    maps = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]])[None]
    assert _map_distances(maps).tolist() == pytest.approx([(0.5 + 0.0 + 0.5) / 3])
    windows = torch.stack([maps, maps], 1)
    assert _map_distances(windows).tolist() == pytest.approx([1 / 3])


def test_cka_is_that_of_whole_activations():
    """Against the definition by kernels of examples, in several batches; it does not see turns and scales."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 5, generator=draw, dtype=torch.float64) + 2
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64))[0]
    x[:, 2] = 3 * x[:, 1] @ turn
    kernels = []
    for h in range(3):
        y = x[:, h] - x[:, h].mean(0)
        kernels.append((y @ y.T).flatten())
    pairs = [float(torch.cosine_similarity(kernels[i], kernels[j], dim=0)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairs[2] == pytest.approx(1.0)
    products = _Products()
    for part in x.split(15):
        products.add(part[None])
    assert products.cka(3) == pytest.approx(sum(pairs) / 3)


def test_equal_heads_have_no_distance_and_masked_heads_do_not_count():
    model, groups = prepared("plain")
    attn = next(m for m in prunable_layers(model).values() if isinstance(m, Attention))
    with torch.no_grad():
        rows = attn.qkv.weight.view(3, 3, -1, attn.qkv.weight.shape[1])
        rows[:, 1] = rows[:, 0]
        if attn.qkv.bias is not None:
            bias = attn.qkv.bias.view(3, 3, -1)
            bias[:, 1] = bias[:, 0]
    x = [images(model, 2, seed=s) for s in range(2)]
    masks = full_masks(groups)
    masks["blocks.0.heads"][2] = False
    keep_(model, masks)
    first, second = head_diversity(model, x)
    assert first["heads"] == 2 and second["heads"] == 3
    assert first["map_distance"] == pytest.approx(0, abs=1e-6) == first["output_distance"]
    assert 0 < second["map_distance"] < 1 and second["map_distance_se"] > 0 and 0 < second["output_distance"] < 1
    masks["blocks.0.heads"][1] = False
    keep_(model, masks)
    assert head_diversity(model, x)[0] == {"block": 0, "heads": 1} | dict.fromkeys(
        ("map_distance", "map_distance_se", "output_distance")
    )


def test_windows_are_looked_at_one_by_one():
    import timm

    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_classes=3, embed_dim=24)
    model = adapters.find(model).prepare(model).eval()
    rows = head_diversity(model, [torch.randn(2, 3, 56, 56)])
    assert [r["heads"] for r in rows] == [3, 6] and all(0 < r["map_distance"] < 1 for r in rows)


def test_command_on_the_digits(tmp_path, capsys):
    args = ["--samples", "40", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["analyze", "attention", "digits", *args]) == 0
    shown, found = capsys.readouterr(), json.loads((tmp_path / "result.json").read_text())
    assert "digits, block 1" in shown.out and found["images"] == 40
    with (tmp_path / "attention.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 4 == len(found["attention"]) and Image.open(tmp_path / "attention.png").size[0] > 500


def test_no_images_is_one_clear_line(capsys):
    args = ["analyze", "attention", "deit_tiny_patch16_224", "--no-pretrained", "--device", "cpu"]
    assert cli.main(args) == 1 and "--data is missing" in capsys.readouterr().err
