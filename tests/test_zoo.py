"""ReViT to the last unit: the rule, the published widths, sizes, and training from nothing."""

import json

import pytest
import timm
import torch

import nvit
from nvit import snapshot, zoo
from nvit.analysis.evaluate import macs, parameters
from nvit.cli import main as cli
from nvit.spec import BlockWidths

SMALL = [(10, 32), (4, 16), (4, 16), *[(8, 32)] * 6, (4, 16), (4, 16), (10, 32)]
TINY = [(10, 16), (2, 8), (2, 8), *[(4, 16)] * 6, (2, 8), (2, 8), (10, 16)]
SWIN = "revit_swin_patch4_window7_224"
NAMES = [f"revit_{size}_{token}patch16_224" for size in ("small", "tiny") for token in ("", "distilled_")] + [SWIN]


@pytest.mark.parametrize(("size", "emb", "heads_and_qk"), [("small", 384, SMALL), ("tiny", 176, TINY)])
@pytest.mark.parametrize("token", ["", "distilled_"])
def test_registered_models_have_the_published_widths(size, emb, heads_and_qk, token):
    model = timm.create_model(f"revit_{size}_{token}patch16_224")
    mlp = [3 * emb] * 3 + [6 * emb] * 6 + [3 * emb] * 3
    expected = [BlockWidths(emb, h, qk, 64, m) for (h, qk), m in zip(heads_and_qk, mlp, strict=True)]
    assert list(snapshot.spec_of(model).blocks) == expected
    for block, w in zip(model.blocks, expected, strict=True):
        assert block.attn.qkv.weight.shape == (w.heads * (2 * w.qk_dim + 64), emb)
        assert block.mlp.fc1.weight.shape == (w.mlp, emb)
        assert block.attn.scale == 64**-0.5


@pytest.mark.parametrize(
    ("name", "millions", "giga_macs"),
    [
        ("revit_small_distilled_patch16_224", 23.12, 4.705),
        ("revit_tiny_distilled_patch16_224", 5.34, 1.135),
        (SWIN, 30.60, 4.589),
    ],
)
def test_sizes(name, millions, giga_macs):
    model = timm.create_model(name)
    assert round(parameters(model) / 1e6, 2) == millions
    assert round(macs(model, (3, 224, 224)) / 1e9, 3) == giga_macs


def test_the_rule():
    """ε·384/100 = 3.84 and 7.68, ε·384/20 = 19.2 and 38.4: the middle is rounded after doubling, not before."""
    outer, middle = BlockWidths(384, 4, 16, 64, 1152), BlockWidths(384, 8, 40, 64, 2304)
    assert zoo.revit_widths(384) == (outer,) * 3 + (middle,) * 6 + (outer,) * 3
    outer, middle = BlockWidths(176, 2, 8, 64, 528), BlockWidths(176, 4, 16, 64, 1056)
    assert zoo.revit_widths(176) == (outer,) * 3 + (middle,) * 6 + (outer,) * 3


@pytest.mark.parametrize(
    ("depth", "doubled"), [(1, [0]), (2, [0, 1]), (4, [1, 2]), (6, [1, 2, 3, 4]), (18, [*range(4, 14)])]
)
def test_the_rule_doubles_the_middle_half_at_any_depth(depth, doubled):
    widths = zoo.revit_widths(512, depth)
    assert [i for i, w in enumerate(widths) if w.mlp == 6 * 512] == doubled
    assert {w.mlp for w in widths} <= {3 * 512, 6 * 512} and len(widths) == depth


def test_narrow_models_keep_a_bundle_of_each():
    assert zoo.revit_widths(16, 1) == (BlockWidths(16, 2, 8, 64, 96),)
    with pytest.raises(ValueError, match="emb 0"):
        zoo.revit_widths(0)


def test_the_rule_makes_a_model_and_blocks_of_two_streams_do_not():
    model = zoo.revit(zoo.revit_widths(48, 4), num_classes=5, img_size=32, drop_path_rate=0.1)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert snapshot.spec_of(model).blocks == zoo.revit_widths(48, 4)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"emb \[48, 64\]"):
        zoo.revit([*zoo.revit_widths(48, 1), *zoo.revit_widths(64, 1)])
    with pytest.raises(ValueError, match="colour"):
        zoo.revit(zoo.revit_widths(48, 1), colour="red")


def test_the_rule_for_a_swin_model_goes_stage_by_stage():
    outer, middle = BlockWidths(352, 4, 16, 64, 1056), BlockWidths(352, 8, 32, 64, 2112)
    stages = zoo.revit_swin_widths(88, (2, 2, 4, 2))
    assert [b.emb for stage in stages for b in stage] == [88] * 2 + [176] * 2 + [352] * 4 + [704] * 2
    assert stages[2] == (outer, middle, middle, outer)
    assert stages[3] == (BlockWidths(704, 14, 72, 64, 4224),) * 2


def test_a_swin_model_of_any_widths_is_built():
    stages = ((BlockWidths(20, 1, 8, 16, 30),), (BlockWidths(36, 3, 8, 16, 70), BlockWidths(36, 2, 16, 8, 100)))
    model = zoo.revit_swin(stages, num_classes=5, img_size=32, window_size=4, drop_path_rate=0.1)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert snapshot.spec_of(model).blocks == (*stages[0], *stages[1])
    assert model.layers[1].blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"stage 1 has blocks of emb \[36, 40\]"):
        zoo.revit_swin((stages[0], (stages[1][0], BlockWidths(40, 2, 8, 8, 30))))
    with pytest.raises(ValueError, match="colour"):
        zoo.revit_swin(stages, colour="red")


@pytest.mark.parametrize("name", ["revit_tiny_patch16_224", "revit_tiny_distilled_patch16_224", SWIN])
def test_saved_and_reloaded_it_is_equal_and_every_weight_trains(name, tmp_path):
    model = timm.create_model(name, num_classes=3, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    snapshot.save(tmp_path / "s", model)
    again = nvit.load(tmp_path / "s")
    assert torch.equal(again(x), model(x))
    assert snapshot.spec_of(again) == snapshot.spec_of(model)
    model.train()
    out = model(x)
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_names_are_known_and_weights_are_not_promised(name):
    assert timm.is_model(name) and not timm.is_model_pretrained(name)
    with pytest.raises(ValueError, match=f"nvit finetune {name} --scratch"):
        zoo.__dict__[name](pretrained=True)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_command_line_trains_one_from_scratch(family, tmp_path):
    from PIL import Image

    name, widths = "revit_tiny_patch16_224", zoo.PUBLISHED["tiny"]
    if family == "swin":  # a small one, from the spec of a snapshot
        stages = zoo.revit_swin_widths(16, (1, 2))
        model = zoo.revit_swin(stages, num_classes=2, img_size=32, window_size=4)
        name, widths = str(snapshot.save(tmp_path / "swin", model)), tuple(b for stage in stages for b in stage)

    for i, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        Image.new("RGB", (224, 224), colour).save(tmp_path / "data" / str(i) / "0.png")
    args = [
        "--scratch",
        "--num-classes",
        "2",
        "--epochs",
        "1",
        "--batch-size",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    out = tmp_path / "out"
    line = ["finetune", name, *args, "--data", str(tmp_path / "data"), "--out", str(out)]
    assert cli.main(line) == 0
    saved = next(p.parent for p in out.rglob("spec.json"))
    assert snapshot.load_spec(saved).blocks == widths
    assert json.loads((out / "result.json").read_text())["params"] == parameters(nvit.load(saved))
