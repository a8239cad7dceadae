"""Towers without a classifier, of timm and of transformers: outputs untouched, masked equals compact equals the host
with zeros, pruned by their features and refitted, through the disk; what comes back are the library's own outputs."""

import copy
from functools import partial

import pytest
import torch

import nvit
from nvit import adapters
from nvit.adapters.hf_hosts import REFUSED
from nvit.adapters.tower import choose_features_
from nvit.analysis.evaluate import macs
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, widths
from tests.families import HOSTS, hf
from tests.hosts import make, random_masks
from tests.references import masked_host

TIMM = {
    "plain": partial(make, "no_classifier"),
    "average": partial(make, "average_pooling", num_classes=0),
    "distilled": partial(make, "deit_distilled", num_classes=0),
}


def beheaded(name):
    model = HOSTS[name]()
    model.reset_classifier(0)
    return model


FAMILIES = ("swin_padded", "eva_dinov3", "eva_02_tiny", "beit_v1", "vit_attention_pooling")
TIMM |= {name: partial(beheaded, name) for name in FAMILIES}
TOWERS = TIMM | hf.TOWER_HOSTS
KEPT_WHOLE = ("hf_clip_tower",)
"""Towers that are refused `keep_output`."""

PRUNED = ("plain", "average", "swin_padded", "eva_02_tiny", "vit_attention_pooling", "hf_vit_tower")
PRUNED += ("hf_dinov3_gated_tower", "hf_clip_tower", "hf_clip_projected_tower", "hf_siglip_tower")
"""One for each way from the stream to the output: class token, mean with a norm of its own, stages, rotary tokens,
pooling by attention, a pooler; gated MLPs; no place for a restored width, a projection, a head that attends."""

BUNDLES = {"bundle_heads": 1, "bundle_emb": 8, "bundle_qk": 2, "bundle_v": 2, "bundle_mlp": 4}


def images(model, batch=2, dtype=torch.float64):
    size = adapters.preprocess(model)["input_size"]
    return torch.randn(batch, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def all_of(model, x):
    """Every tensor of a tower's own output, by name."""
    with torch.no_grad():
        out = model(x)
    return {"features": out} if isinstance(out, torch.Tensor) else {k: v for k, v in out.items() if v is not None}


def assert_same(found, expected, scale, keep=None):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        if found[name].shape != t.shape:
            t = t[..., keep]  # the stream itself
        torch.testing.assert_close(found[name], t, rtol=0, atol=scale * max(1.0, float(t.abs().max())), msg=name)


@pytest.mark.parametrize("name", TOWERS)
def test_masked_equals_compact_equals_the_host_with_zeros(name, tmp_path):
    plain = TOWERS[name]().double()
    model, x = TOWERS[name]().double(), images(plain)
    adapter = adapters.find(model)
    assert adapters.classes(model) == 0 and nvit.adapters.refusal(model) is None
    adapter.prepare(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(all_of(model, x), all_of(plain, x), 1e-12)
    groups = adapter.groups(model)
    masks = random_masks(groups, 0.6)
    stream = [g.name for g in groups if g.kind == "emb"][-1]
    exact = all_of(masked_host(copy.deepcopy(plain), groups, masks), x)
    apply_(model, groups, masks)
    assert_same(all_of(model, x), exact, 1e-10, masks[stream])
    small = compact(model, groups, masks)
    assert_same(all_of(small, x), all_of(model, x), 1e-10)
    small.float()
    again = nvit.load(nvit.snapshot.save(tmp_path / "s", small))
    assert type(again) is type(small)
    assert_same(all_of(again, x.float()), all_of(small, x.float()), 1e-5)
    table = nvit.LatencyTable.analytic(TOWERS[name](), dict.fromkeys(KINDS, 1))
    assert table.model_ms(widths(groups, masks)) * 1e9 == pytest.approx(macs(small, tuple(x.shape[1:])), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in PRUNED if name in TOWERS])
def test_a_tower_is_pruned_by_its_features_and_keeps_its_width(name, tmp_path):
    model = TOWERS[name]()
    dense = all_of(model, x := images(model, dtype=torch.float32))
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, *x.shape[1:], generator=g) for _ in range(3)]
    keep_output = name not in KEPT_WHOLE
    kinds = {"keep_output": True, "only": ("emb",)} if keep_output else {}
    config = nvit.PruneConfig(latency_target=0.75, train=False, refit=True, batch_size=4, **kinds, **BUNDLES)
    result = nvit.prune(model, batches, config, nvit.LatencyTable.analytic(model, config.bundle_sizes))
    found = all_of(result.model, x)
    assert result.snapshots[0].predicted_ratio <= 0.75
    assert result.history[-1]["refit_error"] < 1
    stream = [m for key, m in result.masks.items() if key.endswith("emb")][-1]
    assert bool(stream.all()) != keep_output
    if name == "hf_clip_projected_tower":  # its output is the embedding alone
        assert found.pop("last_hidden_state").shape[-1] == int(stream.sum()) < dense.pop("last_hidden_state").shape[-1]
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in dense.items()}
    again = all_of(nvit.load(result.save(tmp_path / "s")), x)
    assert_same({key: again[key] for key in found}, found, 1e-5)


@pytest.mark.skipif(not hf.HERE, reason="pip install 'nvit[hf]'")
def test_features_are_the_class_token_the_patches_or_all_tokens():
    model = adapters.find(m := hf.make("dinov2_registers_tower")).prepare(m)
    x = images(model, dtype=torch.float32)
    with torch.no_grad():
        tokens = model(x).last_hidden_state
        found = {c: adapters.predict(choose_features_(model, c), x) for c in ("auto", "class", "pooled", "tokens")}
    torch.testing.assert_close(found["auto"], tokens[:, 0])
    torch.testing.assert_close(found["class"], tokens[:, 0])
    torch.testing.assert_close(found["pooled"], tokens[:, 4:].mean(1))
    torch.testing.assert_close(found["tokens"], tokens)
    swin = adapters.find(m := TIMM["swin_padded"]()).prepare(m)
    with pytest.raises(ValueError, match="SwinTransformer has no class token; take pooled or tokens"):
        adapters.predict(choose_features_(swin, "class"), images(swin, dtype=torch.float32))


@pytest.mark.skipif(not hf.HERE, reason="pip install 'nvit[hf]'")
def test_siglip2_is_refused_by_name():
    import transformers

    config = {k: v for k, v in hf.VIT.items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config, intermediate_size=96))
    with pytest.raises(ValueError, match="takes patches with a mask and their spatial shapes, not images"):
        adapters.find(model)
    assert set(REFUSED) == {"Siglip2VisionModel"}
