"""Tokens merged down to a share of the work."""

import pytest
import torch

from nvit import adapters
from nvit.analysis.evaluate import macs
from nvit.analysis.widths import width_rows
from nvit.prune.tokens import merge_to, work_of
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.skeleton import tokens_by_block
from tests.hosts import images, make, random_masks

LARGE = {"img_size": 32, "depth": 3}


def test_a_share_of_the_work_is_met_and_answers_choose_the_family():
    model = make("deit_distilled", **LARGE)
    batches = [images(model, 6)]
    dense = make("deit_distilled", **LARGE)
    whole = macs(dense, (3, 32, 32))
    with pytest.raises(ValueError, match=r"no schedule of merging takes 0\.1 of the work"):
        merge_to(model, 0.1, batches)
    assert adapters.merges(model) == ()
    found = merge_to(model, 0.8, batches)
    assert 0.7 < found["ratio"] <= 0.8
    assert macs(model, (3, 32, 32)) / whole == pytest.approx(found["ratio"], abs=0.01)
    assert adapters.merges(model) == found["merges"] and found["distance"][found["family"]] == min(
        found["distance"].values()
    )
    assert len(found["distance"]) == 2 and all(d > 0 for d in found["distance"].values())


def test_of_a_compact_model_the_dense_one_counts(tmp_path):
    dense = adapters.merge_(make("plain", **LARGE), ())
    groups = adapters.find(dense).groups(dense)
    small = compact(dense, groups, random_masks(groups, 0.8))
    alone = work_of(small)(()) / work_of(dense)(())
    found = merge_to(small, 0.9 * alone, [images(dense)], dense=dense)
    assert 0.75 * alone < found["ratio"] <= 0.9 * alone
    snapshot.save(tmp_path / "s", small)
    spec = snapshot.load_spec(tmp_path / "s")
    assert spec.merges == found["merges"]
    tokens = {"s": tokens_by_block(spec), "dense": tokens_by_block(snapshot.spec_of(dense))}
    rows = width_rows({"s": spec.blocks, "dense": spec.blocks}, tokens)
    left = [17 - sum(found["merges"][: b + 1]) for b in range(3)]
    assert [row["tokens"] for row in rows] == [*left, 17, 17, 17]
    assert "tokens" not in width_rows({"s": spec.blocks}, {"s": [17] * 4})[0]


def test_modes_and_targets():
    model = make("plain", **LARGE).train()
    merge_to(model, 0.8, [torch.randn(2, 3, 32, 32)])
    assert model.training
    with pytest.raises(ValueError, match=r"target is 1\.2"):
        merge_to(model, 1.2, [])
