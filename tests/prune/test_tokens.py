"""Schedules of merging that take a share of the work."""

import pytest

from nvit import adapters
from nvit.analysis.evaluate import macs
from nvit.analysis.widths import width_rows
from nvit.prune.tokens import schedules, work_of
from nvit.selection.schedules import FAMILIES
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.skeleton import tokens_by_block
from tests.hosts import make, random_masks

LARGE = {"img_size": 32, "depth": 3}


def test_a_share_of_the_work_is_met_by_every_family():
    dense = make("deit_distilled", **LARGE)
    work, whole = work_of(dense), macs(dense, (3, 32, 32))
    assert schedules(dense, lambda merges: work(merges) <= 0.1 * work(())) == {}
    found = schedules(dense, lambda merges: work(merges) <= 0.8 * work(()))
    assert set(found) == set(FAMILIES)
    for merges in found.values():
        share = work(merges) / work(())
        assert 0.7 < share <= 0.8
        assert macs(adapters.merge_(dense, merges), (3, 32, 32)) / whole == pytest.approx(share, abs=0.01)
        adapters.merge_(dense, ())


def test_a_compact_model_saves_of_its_own_work(tmp_path):
    dense = adapters.merge_(make("plain", **LARGE), ())
    groups = adapters.find(dense).groups(dense)
    small = compact(dense, groups, random_masks(groups, 0.8))
    whole, work = work_of(dense)(()), work_of(small)
    merges = schedules(small, lambda m: work(m) <= 0.9 * work(()))["constant"]
    assert work(()) < whole and 0.75 * work(()) < work(merges) <= 0.9 * work(())
    snapshot.save(tmp_path / "s", adapters.merge_(small, merges))
    spec = snapshot.load_spec(tmp_path / "s")
    assert spec.merges == merges
    tokens = {"s": tokens_by_block(spec), "dense": tokens_by_block(snapshot.spec_of(dense))}
    rows = width_rows({"s": spec.blocks, "dense": spec.blocks}, tokens)
    left = [17 - sum(merges[: b + 1]) for b in range(3)]
    assert [row["tokens"] for row in rows] == [*left, 17, 17, 17]
    assert "tokens" not in width_rows({"s": spec.blocks}, {"s": [17] * 4})[0]
