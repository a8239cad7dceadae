"""Groups and slices are data: what they declare covers every weight that a width owns, once."""

import math

import pytest
import torch

from nvit.spec import BUNDLE_SIZES, KINDS, BlockWidths, Slice, ViTSpec, block_widths
from tests.hosts import TINY_HOSTS, make, prepared


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_groups_are_named_sized_and_ordered(host):
    model, groups = prepared(host)
    depth = len(model.blocks)
    assert [g.name for g in groups] == ["emb", *(f"blocks.{i}.{kind}" for i in range(depth) for kind in KINDS[1:])]
    assert groups[0].blocks == tuple(range(depth))
    assert all(g.multiple == BUNDLE_SIZES[g.kind] for g in groups)
    heads = model.blocks[0].attn.heads
    sizes = {
        "emb": model.embed_dim,
        "heads": heads,
        "qk_dim": make(host).blocks[0].attn.head_dim,
        "v_dim": make(host).blocks[0].attn.head_dim,
    }
    assert all(g.size == sizes.get(g.kind, model.blocks[0].mlp.fc2.in_features) for g in groups)


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_slices_fit_their_parameters_and_views_are_theirs(host):
    model, groups = prepared(host)
    params = dict(model.named_parameters())
    for g in groups:
        assert g.scored_slices and g.published_slices
        for s in g.slices:
            part = s.of(params[s.name])
            assert part.shape == s.view and s.view[s.axis] == g.size
            assert part.untyped_storage().data_ptr() == params[s.name].untyped_storage().data_ptr(), "a copy"


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_every_weight_with_a_prunable_side_is_declared(host):
    """Zeroing one unit of every group must reach every parameter but the classifiers' biases."""
    model, groups = prepared(host)
    declared = {s.name for g in groups for s in g.slices}
    assert {n for n, _ in model.named_parameters()} - declared <= {"head.bias", "head_dist.bias"}
    for name, p in model.named_parameters():
        owners = [s for g in groups for s in g.slices if s.name == name]
        sides = sum(math.prod(s.view) for s in owners)
        assert sides >= p.numel() or not owners, f"{name}: part of it belongs to nobody"


def test_a_slice_sees_rows_as_its_view():
    p = torch.arange(24.0).view(12, 2)
    s = Slice("w", view=(2, 3, 2), axis=1, rows=(3, 9))
    assert torch.equal(s.of(p), p[3:9].view(2, 3, 2))
    assert torch.equal(s.of(p)[:, 1], torch.stack([p[4], p[7]]))


def test_block_widths_gather_a_groups_count_for_all_its_blocks():
    _, groups = prepared("plain")
    counts = {g.name: i + 1 for i, g in enumerate(groups)}
    assert block_widths(groups, counts) == (BlockWidths(1, 2, 3, 4, 5), BlockWidths(1, 6, 7, 8, 9))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"blocks": []}', "null"])
def test_text_that_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match=r"not valid JSON|has the fields"):
        ViTSpec.from_json(text)
