"""A sweep: six targets in one run, scored once without training; what it excludes is refused."""

import pytest

import nvit
from nvit.cli import main as cli
from nvit.cli.main import parse
from nvit.config import SWEEP
from nvit.prune import oneshot
from tests.runs import Stop, arguments, same, stop_after

ONE_SHOT = {"train": False, "criterion": "fisher", "sweep": True, "latency_target": (0.5,), "images": 16}


def test_a_sweep_scores_once_and_every_target_is_chosen_by_that(monkeypatch, tmp_path):
    looks, score = [], oneshot.score
    monkeypatch.setattr(oneshot, "score", lambda *a, **k: (looks.append(1), score(*a, **k))[1])
    found = nvit.prune(*arguments(**ONE_SHOT))
    assert [p.target for p in found.snapshots] == list(SWEEP) and len(looks) == 1
    assert all(p.predicted_ratio <= p.target for p in found.snapshots)
    alone = nvit.prune(*arguments(**(ONE_SHOT | {"sweep": False, "latency_target": (0.9,)})))
    assert nvit.snapshot.spec_of(alone.model) == nvit.snapshot.spec_of(found.snapshots[0].model)


def test_an_interrupted_sweep_goes_on_by_the_scores_it_had(tmp_path):
    whole = nvit.prune(*arguments(**ONE_SHOT))
    with pytest.raises(Stop):
        nvit.prune(*arguments(**ONE_SHOT), out=tmp_path, progress=stop_after(0))  # a refit or none: scores come first
    model, data, settings, table = arguments(**ONE_SHOT)
    kept = []
    folder = oneshot.between.keep

    def stop_at_the_second(pruner, where):
        folder(pruner, where)
        kept.append(pruner.ratio)
        if len(kept) == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(oneshot.between, "keep", stop_at_the_second)
        nvit.prune(model, data, settings, table, out=tmp_path, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oneshot, "score", lambda *a, **k: pytest.fail("scored again"))
        again = nvit.prune(*arguments(**ONE_SHOT), out=tmp_path, resume=True)
    assert same(whole.masks, again.masks) and len(again.snapshots) == len(SWEEP)


@pytest.mark.parametrize(
    ("recipe", "flags", "says"),
    [
        ("", ["--sweep", "--latency-target", "0.5"], "--sweep stands in place of --latency-target; give one of them"),
        ("", ["--sweep", "--latency-target", "0.7"], "--sweep stands in place of --latency-target"),
        ("sweep = true", ["--latency-target", "0.5"], "--sweep stands in place of --latency-target"),
        ("sweep = true\nlatency_target = [0.5]", [], "--sweep stands in place of --latency-target"),
        ("latency_target = [0.7]", ["--sweep"], "sweep stands in place of latency_target, which is 0.7"),
        ("", ["--sweep", "--latency-ms", "3"], "latency_ms and sweep both say the targets"),
        ("", ["--sweep", "--no-train", "--rounds", "2"], "sweep scores units once, so rounds 2"),
    ],
)
def test_what_a_sweep_excludes_is_refused(recipe, flags, says, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(recipe)
    assert cli.main(["prune", "digits", str(tmp_path / "r.toml"), *flags]) == 2
    assert says in capsys.readouterr().err


def test_recipes_and_the_demo_know_a_sweep(tmp_path):
    config = parse(["prune", "digits", "--sweep", "--dump-config", str(tmp_path / "r.toml")])[1]
    assert config.config.latency_target == SWEEP
    assert parse(["prune", str(tmp_path / "r.toml")])[1].config == config.config
    assert parse(["demo", "--sweep"])[1].config.latency_target == SWEEP
    assert parse(["prune", str(tmp_path / "r.toml"), "--no-sweep", "--latency-target", "0.5"])[1].config.sweep is False


def test_a_dry_run_of_a_sweep_names_its_targets_and_one_look(tmp_path, capsys):
    flags = ["--no-train", "--images", "16", "--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4"]
    assert cli.main(["prune", "digits", "--sweep", *flags, "--device", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "targets: 0.9, 0.8, 0.7, 0.6, 0.5, 0.4" in said and "target-0.4/" in said and "6 times" not in said
