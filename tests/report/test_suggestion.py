"""The knee, what is suggested, and what is said of it."""

import pytest

from nvit.report.knee import front, knee
from nvit.report.model import Model, Run
from nvit.report.suggestion import lost, suggest


def test_the_knee_is_the_point_farthest_above_the_chord():
    curve = [(1.0, 80.0), (0.8, 79.5), (0.6, 78.0), (0.5, 70.0), (0.4, 50.0)]
    assert knee(curve) == 2  # the chord is at 60 there, 18 below; at 0.5 15, at 0.8 9.5
    assert knee(curve[::-1]) == 2 and knee([(10 * x, 3 * y - 7) for x, y in curve]) == 2, (
        "neither order nor units matter"
    )


def test_a_flat_part_is_part_of_the_curve():
    assert knee([(1.0, 97.0), (0.8, 97.0), (0.5, 97.0), (0.3, 93.0)]) == 2


def test_points_that_another_beats_are_no_knee():
    points = [(1.0, 80.0), (0.9, 60.0), (0.6, 79.0), (0.4, 50.0)]
    assert [points[i] for i in front(points)] == [(0.4, 50.0), (0.6, 79.0), (1.0, 80.0)] and knee(points) == 2


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 80.0), (0.5, 70.0)],
        [(1.0, 80.0), (1.0, 75.0), (0.5, 70.0)],
        [(1.0, 80.0), (0.75, 75.0), (0.5, 70.0)],
        [(1.0, 80.0), (0.75, 71.0), (0.5, 70.0)],
        [(1.0, 80.0), (0.75, 80.0), (0.5, 80.0)],
    ],
    ids=["nothing", "two", "two costs", "straight", "hollow", "level"],
)
def test_there_is_no_knee(points):
    assert knee(points) is None


def test_noise_makes_no_knee():
    curve = [(1.0, 80.0), (0.75, 75.4), (0.5, 70.0)]
    assert knee(curve) == 1 and knee(curve, least=0.5) is None


def run(*top1, metric="top1", **more):
    """A run whose targets are 0.9, 0.8 …, with its dense model's quality first."""
    dense = Model("dense", {metric: top1[0]}, dense=True)
    models = [
        Model(f"pruned to {t:g}", {metric: v, "measured_ratio": t} | more, t)
        for t, v in zip((0.9, 0.8, 0.7, 0.6), top1[1:], strict=False)
    ]
    return Run("r", "prune", (dense, *models), title="deit")


def test_the_model_at_the_knee_is_suggested():
    found = suggest(run(80, 79.8, 79.5, 79, 60))
    assert found.model.target == 0.7 and found.knee is found.model
    assert found.headline == "deit pruned to 0.7 runs 1.43 times as fast and loses 1.0 point of top-1."
    assert found.why.startswith("Pruned to 0.7 is at the knee of the curve")


def test_without_a_knee_the_fastest_that_loses_a_point_or_what_loses_least():
    found = suggest(run(80, 79.5, 79.05, 70, 60, top1_se=20.0))
    assert found.knee is None and found.model.target == 0.8 and "at most 1.0 point" in found.why
    assert "within the standard error" in found.why
    found = suggest(run(80, 70, 60, 50, 40))
    assert found.model.target == 0.9 and "loses least" in found.why and "nvit finetune" in found.why


def test_what_is_lost_of_an_error_is_its_rise():
    found = run(2.0, 2.01, 2.5, metric="mae")
    assert lost(found, found.models[2]) == pytest.approx(0.5)
    assert suggest(found).headline == "deit pruned to 0.9 runs 1.11 times as fast; MAE rises by 0.01."


def test_what_was_not_measured_is_said():
    dense = Model("dense", {}, dense=True)
    alone = Run("r", "prune", (dense, Model("pruned to 0.5", {"predicted_ratio": 0.5}, 0.5)), title="deit")
    found = suggest(alone)
    assert found.headline == "deit pruned to 0.5 should run 2.00 times as fast." and "was not measured" in found.why
    assert suggest(Run("r", "prune", ())).model is None
    one = suggest(run(80, 70))
    assert "only model" in one.why and "--sweep" in one.why
