"""GPU hours of recipes follow from what was measured, and the recipes say what follows."""

import re

import pytest

import nvit
from benchmarks.engine import recipe_hours
from nvit.cli.flags.prune import PruneCommand
from nvit.cli.recipe import from_toml

RECIPES = sorted((nvit.BUNDLED.parents[2] / "recipes" / "modern").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_its_hours(path):
    found = recipe_hours.hours(from_toml(PruneCommand, path).config)
    said = float(re.search(r"Expected: ([\d.]+) GPU hours", path.read_text())[1])
    assert said == pytest.approx(found["pruning"] + found["finetuning"], abs=0.05)
    assert found["epochs"] <= 1, "it says that it prunes in about one epoch"


def test_hours_are_images_over_measured_rates(monkeypatch):
    """A loop that always has 100 images/s and decides for nothing."""
    rows = [{"ratio": r, "step_ms": 640.0, "batch_size": 64.0, "settled_images_per_s": 100.0} for r in (1.0, 0.5, 0.25)]
    monkeypatch.setattr(recipe_hours, "measured", lambda: rows)
    monkeypatch.setattr(recipe_hours, "IMAGES", 360_000)
    how = {"latency_target": 0.5, "finetune_epochs": 3, "batch_size": 90, "interval": 10, "bundles_per_step": 4}
    # One decision of the benchmark's leads to 0.5: 400 bundles, 100 decisions here, 1000 steps of 90 images.
    assert recipe_hours.hours(nvit.PruneConfig(**how)) == {"pruning": 0.25, "epochs": 0.25, "finetuning": 3.0}
    assert recipe_hours.hours(nvit.PruneConfig(train=False, refit=True, **how))["pruning"] == 0
    rows[0]["step_ms"] = 640 + 1000 * 3 / recipe_hours.INTERVAL  # 3 s for one of three decisions
    assert recipe_hours.decision_s(rows) == pytest.approx(1)
