"""What is particular to timm's Eva and Beit: images of other sizes, dropped patches, which heads and pairs stay."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.eva import Eva

from nvit import adapters
from nvit.spec import ViTSpec
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from nvit.structure.skeleton import filled, skeleton
from tests.families import beit, eva
from tests.hosts import random_masks, randomise_
from tests.references import masked_host


def prepared(host):
    """A prepared model and its groups."""
    model = adapters.find(host).prepare(host)
    return model, adapters.find(model).groups(model)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(got, exact, scale: float = 1e-10):
    torch.testing.assert_close(got, exact, rtol=0, atol=scale * float(exact.abs().max()))


@torch.no_grad()
def test_a_compact_model_takes_images_of_another_size(tmp_path):
    """Its positions are turned by angles of the grid that comes, as in the dense model."""
    plain = eva.make("dinov3").double()
    model, groups = prepared(eva.make("dinov3").double())
    masks = random_masks(groups, 0.6)
    small = compact(model, groups, masks)
    exact = masked_host(plain, groups, masks)
    for size in ((32, 48), (48, 32), (64, 64)):
        assert_same(small(images(*size)), exact(images(*size)))
    reloaded = snapshot.load(snapshot.save(tmp_path / "s", small.float()))
    assert_same(reloaded(images(64, 64).float()), exact(images(64, 64)).float(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["02_tiny", "rope_mixed"])
def test_dropped_patches_take_their_angles_with_them(kind):
    host = randomise_(Eva(**eva.TINY | eva.KINDS[kind] | {"img_size": 56, "patch_drop_rate": 0.5})).double()
    model, groups = prepared(host.train())
    masks = random_masks(groups, 0.6)
    small, x, found = compact(model, groups, masks), images(56, 56), []
    apply_(model, groups, masks)
    for net in (model, small, small):
        torch.manual_seed(len(found) // 2)
        found.append(net(x))
    assert_same(found[0], found[1])
    assert not torch.allclose(found[1], found[2]), "other patches were dropped"


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "kind", "counted"),
    [
        (eva.make, "02_tiny", {"qk_dim"}),
        (eva.make, "rope_mixed", {"qk_dim", "heads"}),
        (eva.make, "giant", set()),
        (beit.make, "shared", {"heads"}),
        (beit.make, "v1", set()),
    ],
)
def test_a_spec_says_which_pairs_and_heads_are_left_where_it_matters(make, kind, counted):
    model, groups = prepared(make(kind).double())
    masks = random_masks(groups, 0.6)
    small = compact(model, groups, masks)
    spec = ViTSpec.from_json(snapshot.spec_of(small).to_json())
    kinds = {g.name: g.kind for g in groups}
    assert {kinds[name] for name in spec.kept} == counted
    for name, units in spec.kept.items():
        assert units == tuple(masks[name].nonzero().squeeze(1).tolist())
    if not counted:
        return
    # Taken for the first ones instead, they compute something else.
    size = adapters.preprocess(small)["input_size"][1:]
    exact, params = small(images(*size)), {n: p.detach() for n, p in small.named_parameters()}
    for kept, same in ((spec.kept, True), ({}, False)):
        again = filled(skeleton(replace(spec, kept=kept)), params).double()
        assert torch.allclose(again(images(*size)), exact, atol=1e-5) is same


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"use_post_norm": True}, "block type EvaBlockPostNorm; only the pre-norm EvaBlock is known"),
        (
            {"attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": (4, 2)},
            "grouped-query attention (2 key heads for 4 query heads)",
        ),
        (
            {"norm_layer": partial(torch.nn.LayerNorm, elementwise_affine=False)},
            "norm type LayerNorm before the blocks",
        ),
    ],
)
def test_what_is_unknown_is_refused_with_its_reason(more, reason):
    model = Eva(**eva.TINY | {"use_pre_transformer_norm": True} | more)
    assert adapters.refusal(model) == reason


def test_a_gated_attention_is_refused():
    model = Eva(**eva.TINY)
    model.blocks[1].attn.gate = torch.nn.Linear(48, 48)
    assert adapters.refusal(model) == "gated attention output"


def test_a_rotary_table_follows_size_dtype_and_training():
    """DINOv3's is made once, not in every pass, and is timm's own; what augments it in training is drawn each time."""
    plain, (model, _) = eva.make("dinov3"), prepared(eva.make("dinov3"))
    first = model.rope.get_embed(shape=(2, 3))
    assert model.rope.get_embed(shape=(2, 3)) is first
    for shape in ((2, 3), (3, 3)):
        assert_same(model.rope.get_embed(shape=shape), plain.rope.get_embed(shape=shape), 0)
    with torch.inference_mode():
        made = model.rope.get_embed(shape=(4, 4))
    assert not made.is_inference()
    model, _ = prepared(eva.make("sapiens2"))
    model.train()
    assert not torch.equal(model.rope.get_embed(shape=(2, 3)), model.rope.get_embed(shape=(2, 3)))
