"""A table once tokens merge: exact where operations are counted, and widths leave where tokens still are."""

import numpy as np
import pytest

from nvit import adapters
from nvit.latency.table import LatencyTable
from nvit.prune.merged_table import merged_table
from nvit.selection.lagrangian import drop_to_target
from nvit.structure.masks import full_masks, kept_counts
from tests.hosts import make

MERGES = (8, 4, 2)


@pytest.fixture
def model():
    return adapters.find(host := make("plain", img_size=32, depth=3)).prepare(host)


def test_of_counted_operations_it_is_that_of_the_merged_model(model):
    table = LatencyTable.analytic(model)
    found = merged_table(table, model, MERGES)
    merged = LatencyTable.analytic(adapters.merge_(make("plain", img_size=32, depth=3), MERGES))
    assert found.dense_ms == pytest.approx(merged.dense_ms, rel=1e-9)
    assert merged_table(table, model, (0, 0, 0)).dense_ms == pytest.approx(table.dense_ms, rel=1e-9)
    assert adapters.merges(model) == ()
    half = np.array([[getattr(b, k) for k in ("emb", "heads", "qk_dim", "v_dim", "mlp")] for b in table.dense])
    half[:, 4] //= 2  # linear in the hidden units, so that shares of them are exact
    assert found.ms(half) == pytest.approx(merged.ms(half), rel=1e-9)


def test_widths_leave_early_blocks_before_late_ones(model):
    table, groups = LatencyTable.analytic(model), adapters.find(model).groups(model)
    hidden = [g for g in groups if g.kind == "mlp"]
    scores = {g.name: full_masks(groups)[g.name].float() for g in hidden}  # alike everywhere
    merged = merged_table(table, model, MERGES)
    masks, _ = drop_to_target(scores, full_masks(groups), groups, merged, 0.85 * merged.dense_ms)
    kept = kept_counts(masks)
    first, _, last = (kept[g.name] for g in hidden)
    assert first < last
