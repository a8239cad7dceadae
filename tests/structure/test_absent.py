"""Attention and MLPs that have left whole: masked, compact, written and read again, exported."""

import onnxruntime
import pytest
import torch
import transformers

import nvit
import nvit.hf
from nvit import LatencyTable, adapters, snapshot
from nvit.analysis.evaluate import macs
from nvit.cli.main import main
from nvit.export.export import export
from nvit.layers import Absent, prunable_layers
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, check_masks, full_masks, kept_counts, widths
from tests.families import HOSTS
from tests.hosts import make, random_masks

CASES = ["deit3", "no_proj_bias", "vit_deit_distilled", "eva_rope_mixed", "beit_both", "hf_vit", "hf_dinov2_registers"]


def build(name, dtype=torch.float32):
    """A prepared model, its groups, images, and masks without the first attention and the last MLP."""
    model = (HOSTS[name]() if name in HOSTS else make(name)).to(dtype)
    groups = adapters.find(model).groups(adapters.find(model).prepare(model))
    masks = random_masks(groups)
    last = max(g.blocks[0] for g in groups)
    for g in groups:
        if g.name in ("blocks.0.heads", f"blocks.{last}.mlp"):
            for ended in (g.name, *g.ends):
                masks[ended][:] = False
    size = adapters.preprocess(model)["input_size"]
    return model, groups, torch.randn(3, *size, generator=torch.Generator().manual_seed(1)).to(dtype), masks


def out(model, x):
    with torch.no_grad():
        return torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1)


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_compact_equals_reloaded_and_can_be_pruned_again(name, tmp_path):
    model, groups, x, masks = build(name)
    whole = out(model, x)
    apply_(model, groups, masks)
    exact = out(model, x)
    close = {"rtol": 0, "atol": 1e-5 * float(exact.abs().max())}
    assert not torch.allclose(exact, whole, **close)
    small = compact(model, groups, masks)
    torch.testing.assert_close(out(small, x), exact, **close)
    assert sum(isinstance(m, Absent) for m in small.modules()) == 2
    gone = {n for n, keep in masks.items() if not keep.any()}
    again = adapters.find(small).groups(small)
    assert {g.name: g.size for g in again} == {n: k for n, k in kept_counts(masks).items() if n not in gone}

    back = snapshot.load(snapshot.save(tmp_path / "s", model))
    torch.testing.assert_close(out(back, x), exact, **close)
    blocks = snapshot.load_spec(tmp_path / "s").blocks
    assert (blocks[0].heads, blocks[0].qk_dim, blocks[0].v_dim, blocks[-1].mlp) == (0, 0, 0, 0)
    assert not any(n.startswith("blocks.0.norm1") for n in back.state_dict()), "the norm before it has left as well"

    more = random_masks(again, 0.7, seed=5)
    narrower = compact(small, again, more)
    apply_(small, again, more)
    torch.testing.assert_close(out(narrower, x), out(small, x), **close)
    table = LatencyTable.analytic(narrower)
    assert table.dense_ms * 1e9 == pytest.approx(macs(narrower, tuple(x.shape[1:])), rel=1e-9)
    whole = LatencyTable.analytic(HOSTS[name]() if name in HOSTS else make(name), dict.fromkeys(KINDS, 1))
    assert whole.model_ms(blocks) * 1e9 == pytest.approx(macs(back, tuple(x.shape[1:])), rel=1e-9)


def test_a_model_of_absent_sublayers_alone_has_a_table_and_a_snapshot(tmp_path):
    model, groups, x, _ = build("plain")
    masks = full_masks(groups)
    for g in groups:
        masks[g.name][:] = g.kind == "emb"
    apply_(model, groups, masks)
    small = snapshot.load(snapshot.save(tmp_path / "s", model))
    torch.testing.assert_close(out(small, x), out(model, x))
    assert [p.name for p in adapters.find(small).parts(small)] == ["rest"]
    table = LatencyTable.measure(small, 1, seconds=0.01)
    assert table.dense_ms > 0 and table.dense == widths(groups, masks)


def test_an_absent_sublayer_trains_and_exports_to_onnx(tmp_path):
    model, groups, x, masks = build("vit_deit_distilled")
    apply_(model, groups, masks)
    small = compact(model, groups, masks)
    small(x).square().sum().backward()
    names = {n for n, p in small.named_parameters() if p.grad is None}
    assert not names, f"nobody reads {names}"
    export(small.eval(), tmp_path, ["torch", "onnx"])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), rtol=0, atol=1e-4)


def test_what_ends_ends_together_and_swin_keeps_its_last_bundles():
    _, groups, _, masks = build("plain")
    masks["blocks.0.qk_dim"][0] = True
    with pytest.raises(ValueError, match=r"blocks.0.qk_dim: mask keeps units of an attention without heads"):
        check_masks(groups, masks)
    masks["blocks.0.heads"][0] = masks["blocks.0.v_dim"][0] = True
    masks["blocks.1.v_dim"][:] = False
    with pytest.raises(ValueError, match=r"blocks.1.v_dim: mask keeps nothing"):
        check_masks(groups, masks)
    swin = HOSTS["swin_three_stages"]()
    groups = adapters.find(swin).groups(adapters.find(swin).prepare(swin))
    with pytest.raises(ValueError, match="mask keeps nothing"):
        check_masks(groups, {n: k if "mlp" not in n else ~k for n, k in full_masks(groups).items()})


def test_layers_that_have_left_keep_their_bias_and_add_nothing_without():
    model, groups, _, masks = build("no_proj_bias")
    small = compact(model, groups, masks)
    absent = [m for m in prunable_layers(small).values() if isinstance(m, Absent)]
    assert [m.bias is None for m in absent] == [True, True]
    assert torch.equal(absent[0](torch.ones(2, 3, 4)), torch.zeros(2, 3, 4))


def test_transformers_save_and_load_what_has_left(tmp_path):
    model, groups, x, masks = build("hf_dinov2_registers")
    apply_(model, groups, masks)
    folder = nvit.hf.save_pretrained(model, tmp_path / "s")
    back = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    exact = out(model, x)
    for found in (back(x).logits.detach(), out(nvit.load(folder), x)):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_a_segmenter_on_a_model_of_which_sublayers_have_left_is_read_again(tmp_path):
    model, groups, x, masks = build("average_pooling")
    found = nvit.adapters.segmenter(compact(model, groups, masks), ["ink", "paper"]).eval()
    back = snapshot.load(snapshot.save(tmp_path / "s", found))
    torch.testing.assert_close(out(back, x), out(found, x), rtol=0, atol=1e-5)


def test_widths_that_have_left_are_told_and_drawn(tmp_path):
    model, groups, _, masks = build("plain")
    snapshot.save(tmp_path / "s", compact(model, groups, masks))
    assert main(["analyze", "widths", str(tmp_path / "s"), "--out", str(tmp_path)]) == 0
    rows = [row.split(",") for row in (tmp_path / "widths.csv").read_text().splitlines()]
    heads, mlp = (rows[0].index(kind) for kind in ("heads", "mlp"))
    assert [rows[1][heads], rows[2][mlp]] == ["0", "0"]
    assert (tmp_path / "widths.png").stat().st_size > 1000


def test_tokens_do_not_merge_where_attention_has_left():
    model, groups, x, masks = build("plain")
    small = compact(model, groups, masks)
    with pytest.raises(ValueError, match="cannot merge in block 0: its attention has left"):
        adapters.merge_(small, (1, 1))
    adapters.merge_(small, (0, 1))
    assert out(small, x).isfinite().all()
