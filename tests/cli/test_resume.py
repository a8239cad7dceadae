"""`--resume`: a finished run is told again, a run without training goes on after its last target."""

import json
import shutil

import pytest

import nvit
from nvit.cli import main as cli
from nvit.cli import prune as command
from nvit.prune import between, oneshot
from tests.runs import arguments

QUICK = ("--table", "analytic", "--latency-seconds", "0.2", "--latency-batch", "4", "--device", "cpu")
SCORED = ("--no-train", "--score-batches", "2", "--eval-images", "16")
ONE_SHOT = ["demo", *QUICK, *SCORED, "--latency-target", "0.8", "0.6"]


def files(folder):
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_prints_its_result_and_nothing_is_touched(tmp_path, capsys, monkeypatch):
    args = [*ONE_SHOT, "--finetune-epochs", "0", "--out", str(tmp_path / "o")]
    assert cli.main(args) == 0
    first, before = capsys.readouterr().out, files(tmp_path / "o")
    monkeypatch.setattr(command, "run_prune", None)
    assert cli.main([*args, "--resume"]) == 0
    again = capsys.readouterr().out
    assert again == f"{tmp_path / 'o'} is finished already; this is its result\n{first}"
    assert files(tmp_path / "o") == before
    (tmp_path / "o" / "result.json").write_text("{")
    assert cli.main([*args, "--resume"]) == 1 and "result.json cannot be read" in capsys.readouterr().err


def test_a_finished_finetuning_as_well(tmp_path, capsys):
    args = ["finetune", "digits", "--epochs", "0.1", "--distill-weight", "0", "--device", "cpu"]
    args += ["--out", str(tmp_path / "f")]
    assert cli.main(args) == 0
    first = capsys.readouterr().out
    assert cli.main([*args, "--resume"]) == 0
    assert capsys.readouterr().out.endswith(first)


class Enough(Exception):
    """Raised where a run is interrupted."""


@pytest.mark.parametrize("more", [{}, {"refit": True}, {"criterion": "abs", "labels": "sampled"}, {"rounds": 2}])
def test_one_shot_goes_on_after_its_last_target_as_if_it_had_not_ended(more, tmp_path, monkeypatch):
    def run(out, resume=False):
        settings = {"train": False, "latency_target": (0.8, 0.65, 0.5), "score_batches": 2} | more
        return nvit.prune(*arguments(**settings), out=tmp_path / out, resume=resume)

    whole = run("whole")
    scored, score = [], oneshot.score

    def until(calls):
        def counted(*args, **kwargs):
            scored.append(1)
            if len(scored) > calls:
                raise Enough
            return score(*args, **kwargs)

        return counted

    rounds = more.get("rounds", 1)
    with monkeypatch.context() as m, pytest.raises(Enough):
        m.setattr(oneshot, "score", until(2 * rounds))
        run("o")
    assert (tmp_path / "o" / "run_state.safetensors").exists()
    scored.clear()
    monkeypatch.setattr(oneshot, "score", until(99))
    result = run("o", resume=True)
    assert len(scored) == rounds, "what was decided is not decided again"
    assert [p.target for p in result.snapshots] == [0.8, 0.65, 0.5]
    assert [h["predicted_ratio"] for h in result.history] == [h["predicted_ratio"] for h in whole.history]
    for target in ("0.8", "0.65", "0.5"):
        a, b = ((tmp_path / n / f"target-{target}" / "weights.safetensors").read_bytes() for n in ("o", "whole"))
        assert a == b, target
    scored.clear()
    assert run("o", resume=True).history == result.history and not scored


def test_a_state_of_another_recipe_is_refused(tmp_path):
    settings = {"train": False, "latency_target": (0.8,), "score_batches": 2}
    nvit.prune(*arguments(**settings), out=tmp_path / "o")
    for other, says in (
        ({"score_batches": 1}, "is of a run with score_batches 2, this one has 1"),
        ({"train": True}, "is of a run without training"),
    ):
        with pytest.raises(ValueError, match=says):
            nvit.prune(*arguments(**(settings | other)), out=tmp_path / "o", resume=True)
    shutil.copytree(tmp_path / "o", tmp_path / "t")
    (tmp_path / "t" / "run_state.safetensors").unlink()
    nvit.prune(*arguments(latency_target=(0.8,)), out=tmp_path / "t")
    with pytest.raises(ValueError, match="is of a run that trains"):
        nvit.prune(*arguments(**settings), out=tmp_path / "t", resume=True)


def test_under_a_budget_no_state_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(between, "keep", None)
    args = [*ONE_SHOT, "--finetune-epochs", "0", "--budget", "40GB", "--out", str(tmp_path / "o")]
    assert cli.main(args) == 0 and json.loads((tmp_path / "o" / "result.json").read_text())["memory"]


def test_ctrl_c_after_a_target_offers_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    args = [*ONE_SHOT, "--finetune-epochs", "1", "--out", str(tmp_path / "o")]
    with monkeypatch.context() as m:
        m.setattr(command, "finetune_snapshots", interrupted)
        assert cli.main(args) == 130
    assert capsys.readouterr().err.endswith("nvit: interrupted; the same command with --resume goes on\n")
    monkeypatch.setattr(oneshot, "score", interrupted)
    assert cli.main([*args, "--resume"]) == 0
