"""The analyses of the paper as the benchmark keeps them: what commands found, under names without a machine's paths."""

import csv

import pytest

import nvit
from benchmarks import harness
from benchmarks.accuracy import analyses
from nvit import zoo
from nvit.spec import BlockWidths
from nvit.structure import snapshot


def kept(folder, name):
    with (folder / f"analyses_{name}_cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of models of three blocks, in place of those that pruning would take minutes for."""
    for i, run in enumerate(("pruned", "fisher")):
        for target, emb in (("0.65", 64), ("0.5", 64 - 32 * i)):
            blocks = [BlockWidths(max(32, emb), 2, 16, 16, mlp) for mlp in (64, 128, 64)]
            snapshot.save(tmp_path / run / f"target-{target}", zoo.revit(blocks, img_size=32, num_classes=3))
    monkeypatch.setattr(analyses, "prune", lambda run: None)
    monkeypatch.setattr(analyses, "shot", lambda out, pruned: None)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    return tmp_path


def test_widths_slopes_and_rules_of_every_run(runs):
    analyses.widths(runs, runs / "pruned")
    rows = kept(runs / "results", "widths")
    assert len(rows) == 2 * 2 * 3 and {r["model"] for r in rows[:6]} == {"pruned/target-0.65", "pruned/target-0.5"}
    slopes = kept(runs / "results", "slopes")
    assert {r["run"] for r in slopes} == {"fisher"}, "where all streams are the same there are none"
    analyses.rule(runs, runs / "pruned")
    first = kept(runs / "results", "rule")[0]
    assert (first["run"], first["first"], first["last"], first["snapshots"]) == ("pruned", "2", "2", "2")


def test_a_command_that_ran_to_its_end_is_not_run_again(tmp_path, monkeypatch):
    out = tmp_path / "w"
    assert analyses.found(out, "analyze", "widths", str(nvit.BUNDLED))["csv"] == str(out / "widths.csv")
    monkeypatch.setattr(analyses.cli, "main", lambda words: pytest.fail("run again"))
    assert analyses.found(out, "analyze", "widths")["widths"]


def test_numbers_are_numbers_and_what_is_not_known_stays_empty():
    row = {"model": "/tmp/x/target-0.5", "block": "3", "map_distance": "0.25", "output_distance": ""}
    assert analyses.numbers(row) == {"model": "x/target-0.5", "block": 3, "map_distance": 0.25, "output_distance": ""}
