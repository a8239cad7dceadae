"""Queries and keys refitted in turn bring the logits nearer to the dense model's."""

import copy

import pytest
import torch

from benchmarks.accuracy import logit_refit
from nvit import adapters
from nvit.calibration.statistics import gather_statistics
from nvit.structure.masks import apply_, full_masks
from tests.hosts import images, prepared


@pytest.mark.parametrize("host", ["plain", "no_qkv_bias"])
def test_logit_refit_brings_logits_nearer_turn_by_turn_and_changes_nothing_where_nothing_left(host):
    model, groups = prepared(host)
    dense = copy.deepcopy(model)
    xs = [images(model, 6, seed=s) for s in range(5)]
    seen = gather_statistics(dense, xs)
    masks = full_masks(groups)
    errors = []
    for narrow, turns in ((False, 1), (True, 0), (True, 1), (True, 6)):
        model = copy.deepcopy(dense)
        if narrow:
            for g in groups:
                if g.kind == "qk_dim":
                    masks[g.name][: g.size // 2] = False
        apply_(model, groups, masks)
        before = copy.deepcopy(model)
        if turns:
            logit_refit.refit_logits_(model, dense, groups, xs, seen, turns)
        if not narrow:
            for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
            continue
        changed = [n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if not p.equal(q)]
        assert all(".attn.qkv." in n for n in changed)
        errors.append(_first_logits_error(model, dense, xs))
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1]


def _first_logits_error(model, dense, xs) -> float:
    """Of the first block's logits, which have the dense model's inputs, about the mean over keys."""
    found = []
    for m in (model, dense):
        logits = []

        def read(layer, args, _, logits=logits):
            heads, dims, _ = layer.kept
            rows = layer.q_rows
            w = layer.qkv.weight if rows is None else layer.qkv.weight[rows]
            b = layer.qkv.bias if rows is None or layer.qkv.bias is None else layer.qkv.bias[rows]
            q, k = (
                torch.nn.functional.linear(args[0], w, b)[..., : 2 * heads * dims]
                .unflatten(-1, (2, heads, dims))
                .unbind(2)
            )
            z = q.movedim(2, 1) @ k.movedim(2, 1).mT
            logits.append(z - z.mean(-1, keepdim=True))

        hook = m.blocks[0].attn.register_forward_hook(read)
        with torch.no_grad():
            for x in xs:
                adapters.find(m).logits(m, x)
        hook.remove()
        found.append(torch.cat(logits))
    return float((found[0] - found[1]).square().mean())
