"""A masked model and its compact twin compute the same function; so does a dense model with explicit zero masks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nvit import adapters, snapshot
from nvit.structure.compact import compact, cut
from nvit.structure.masks import apply_, full_masks, kept_counts, project_, weight_masks, widths
from tests.hosts import TINY_HOSTS, images, make, masked, masks_for, prepared, random_masks
from tests.references import masked_vit

ROOT = Path(__file__).parents[2]

RELOAD = """
import sys, torch, nvit
from pathlib import Path
from safetensors.torch import load_file, save_file
root = Path(sys.argv[1])
out = {}
with torch.inference_mode():
    for name, x in load_file(root / "images.safetensors").items():
        out[name] = nvit.load(root / name)(x).contiguous()
save_file(out, root / "logits.safetensors")
"""


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_prepare_changes_no_output_and_no_name(host):
    plain, model = make(host, torch.float64), make(host, torch.float64)
    model = adapters.find(model).prepare(model)
    x = images(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)  # fp64: only the order of sums differs
    assert adapters.find(model).prepare(model) is model


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_masked_equals_compact_and_the_zero_mask_reference(host):
    plain = make(host, torch.float64)
    x = images(plain)

    @settings(max_examples=8)
    @given(st.data())
    def check(data):
        model, groups = prepared(host, torch.float64)
        masks = data.draw(masks_for(groups))
        apply_(model, groups, masks)
        with torch.no_grad():
            got, exact, small = model(x), masked_vit(plain, x, masks), compact(model, groups, masks)
            # fp64 throughout: what differs is the order of sums, some thousand roundings of 1e-16.
            torch.testing.assert_close(got, exact, rtol=0, atol=1e-10 * max(1.0, float(exact.abs().max())))
            torch.testing.assert_close(small(x), exact, rtol=0, atol=1e-10 * max(1.0, float(exact.abs().max())))

    check()


def test_masked_equals_compact_after_reload_in_a_new_process(tmp_path):
    """Row 2: fp32, through the disk, one child process for all hosts and masks."""
    inputs, expected = {}, {}

    @settings(max_examples=4)
    @given(st.data())
    def save(data):
        for host in TINY_HOSTS:
            model, groups = prepared(host)
            masks = data.draw(masks_for(groups))
            apply_(model, groups, masks)
            name = f"{host}-{len(inputs)}"
            inputs[name] = images(model)
            with torch.no_grad():
                expected[name] = model(inputs[name])
            snapshot.save(tmp_path / name, compact(model, groups, masks))

    save()
    save_file(inputs, tmp_path / "images.safetensors")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=400, cwd=ROOT)
    reloaded = load_file(tmp_path / "logits.safetensors")
    assert len(reloaded) == len(expected) >= 4 * len(TINY_HOSTS)
    for name, logits in expected.items():
        worst = float((reloaded[name] - logits).abs().max())
        assert worst <= 1e-5 * float(logits.abs().max()), f"{name}: {worst:.2e} of {float(logits.abs().max()):.2e}"


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_gradients_of_kept_weights_equal_the_compact_twins(host):
    model, groups, masks = masked(host, dtype=torch.float64)
    small, x = compact(model, groups, masks), images(model)
    model(x).square().sum().backward()
    small(x).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    weights = weight_masks(dict(model.named_parameters()), groups, masks)
    narrow = cut(grads, weights)
    for name, p in small.named_parameters():
        torch.testing.assert_close(narrow[name], p.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, dims in weights.items():
        if name in grads and all(keep is None for keep in dims[1:]):
            assert not grads[name][~dims[0]].any(), f"{name}: a pruned weight has a gradient"


def test_dynamic_size_masked_equals_compact_at_another_size():
    model, groups, masks = masked("dynamic_size", dtype=torch.float64)
    small = compact(model, groups, masks)
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The position embedding is resampled channel by channel in fp32, so both see the same numbers.
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers"])
def test_compact_can_be_pruned_again(host):
    """Twice in succession equals once with both masks, with the first dense model's logit scale."""
    model, groups, masks = masked(host, keep=0.7, dtype=torch.float64)
    small = compact(model, groups, masks)
    again = adapters.find(small).groups(small)
    assert {g.name: g.size for g in again} == kept_counts(masks)
    second = random_masks(again, keep=0.6, seed=9)
    apply_(small, again, second)
    both = {}
    for name, keep in masks.items():
        both[name] = keep.clone()
        both[name][keep] = second[name]
    exact = masked_vit(make(host, torch.float64), images(model), both)
    for got in (small, compact(small, again, second)):
        torch.testing.assert_close(got(images(model)), exact, rtol=0, atol=1e-10)


def test_compact_shapes_and_count_follow_the_widths():
    model, groups, masks = masked("plain")
    small, w = compact(model, groups, masks), widths(groups, masks)
    emb = int(masks["emb"].sum())
    for i, b in enumerate(w):
        block = small.blocks[i]
        assert block.attn.qkv.weight.shape == (b.heads * (2 * b.qk_dim + b.v_dim), emb)
        assert block.attn.proj.weight.shape == (emb, b.heads * b.v_dim)
        assert block.mlp.fc1.weight.shape == (b.mlp, emb)
        assert block.mlp.fc2.weight.shape == (emb, b.mlp)
    assert small.head.weight.shape == (7, emb) and small.pos_embed.shape[-1] == emb


def test_every_weight_belongs_to_its_kept_units_or_is_zero():
    """A weight survives exactly where all groups that share it keep it: independent of how slices are declared."""
    model, _, masks = masked("plain")
    heads, dim, i = 3, 16, 0
    b = {kind: masks[f"blocks.{i}.{kind}"] for kind in ("heads", "qk_dim", "v_dim", "mlp")}
    p = dict(model.named_parameters())
    for part, unit in enumerate((b["qk_dim"], b["qk_dim"], b["v_dim"])):
        rows = torch.tensor([[bool(b["heads"][h] and unit[u]) for u in range(dim)] for h in range(heads)]).flatten()
        span = slice(part * heads * dim, (part + 1) * heads * dim)
        alive = rows[:, None] & masks["emb"][None]
        assert torch.equal(p["blocks.0.attn.qkv.weight"][span] != 0, alive)
        assert torch.equal(p["blocks.0.attn.qkv.bias"][span] != 0, rows)
    assert torch.equal(p["blocks.0.mlp.fc1.weight"] != 0, b["mlp"][:, None] & masks["emb"])
    assert torch.equal(p["blocks.0.mlp.fc2.weight"] != 0, masks["emb"][:, None] & b["mlp"])
    assert torch.equal(p["head.bias"] != 0, torch.ones(7, dtype=torch.bool))


def test_project_again_after_an_optimiser_step_restores_the_zeros():
    model, groups, masks = masked("plain")
    params = dict(model.named_parameters())
    weights = weight_masks(params, groups, masks)
    before = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for p in params.values():
            p.add_(1.0)
    project_(params, weights)
    for name, p in params.items():
        assert torch.equal(p == 0, before[name] == 0), name


def test_full_masks_change_nothing():
    model, groups = prepared("plain")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_(model, groups, full_masks(groups))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("blocks.1.mlp"), "blocks.1.mlp: no mask for this group"),
        (lambda m: m.update({"emb": m["emb"][:-1]}), "emb: mask has 47 entries but this model has 48 units"),
        (lambda m: m["blocks.0.qk_dim"].zero_(), "blocks.0.qk_dim: mask keeps nothing"),
        (lambda m: m["blocks.0.heads"].zero_(), "blocks.0.qk_dim: mask keeps units of an attention without heads"),
    ],
)
@pytest.mark.parametrize("use", [apply_, compact])
def test_masks_of_another_model_are_refused(use, change, message):
    model, groups = prepared("plain")
    masks = full_masks(groups)
    change(masks)
    with pytest.raises(ValueError, match=message):
        use(model, groups, masks)
