"""Runs that stop, are killed or meet a bad number: what is kept, and that they go on as if nothing had been."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nvit
from nvit.layers import prunable_layers
from nvit.structure.run_state import load_run_state
from tests.runs import Stop, arguments, loader, same, stop_after, weights


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"criterion": "abs", "momentum": 0.5},
        {"criterion": "fisher", "bundles_per_step": 1},
        {"ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "grad_clip": 1.0, "optimizer": "sgd"},
        {"criterion": "random", "train_mode": True, "amp": "bf16"},
    ],
    ids=str,
)
def test_an_interrupted_run_equals_the_uninterrupted_one(more, tmp_path):
    """Bit for bit: stopped three times, each time gone on with new objects from what is on disk."""
    model, data, settings, table = arguments(**more)
    whole = nvit.prune(model, data, settings, table, out=tmp_path / "whole")
    steps = whole.history[-1]["step"]
    assert steps >= 8, "too short to be interrupted"
    for calls in (1, steps // 3, steps // 4):
        with pytest.raises(Stop):
            nvit.prune(*arguments(**more), out=tmp_path / "run", resume=True, progress=stop_after(calls))
    again, *rest = arguments(**more)
    resumed = nvit.prune(again, *rest, out=tmp_path / "run", resume=True)
    assert same(whole.masks, resumed.masks) and same(weights(model), weights(again))
    assert whole.history == resumed.history
    assert len(whole.snapshots) == len(resumed.snapshots) == 2
    for a, b in zip(whole.snapshots, resumed.snapshots, strict=True):
        assert a.predicted_ratio == b.predicted_ratio and same(weights(a.model), weights(b.model))


def test_a_finished_run_resumes_to_its_result(tmp_path):
    model, *rest = arguments(criterion="abs")
    first = nvit.prune(model, *rest, out=tmp_path)
    again, *rest = arguments(criterion="abs")
    second = nvit.prune(again, *rest, out=tmp_path, resume=True, progress=stop_after(0))
    assert same(weights(first.model), weights(second.model)) and same(weights(model), weights(again))
    assert same(first.masks, second.masks)
    assert all(not getattr(m, "_watches", None) for m in again.modules()), "gates are still being read"


def test_killed_at_random_moments_a_run_ends_as_if_it_never_was(tmp_path):
    """Row 9: kill -9 up to six times, then resume; masks, weights and snapshots are those of the run never killed."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3, "the run was over before it could be killed"
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert same(whole, killed)
    leftover = [p.name for p in (tmp_path / "killed").iterdir() if not p.name.startswith(".")]
    assert sorted(leftover) == ["run_state.safetensors", "target-0.5", "target-0.8"]


def test_an_interrupted_run_leaves_no_taps_on_the_model(tmp_path):
    model, *rest = arguments(criterion="abs")
    with pytest.raises(Stop):
        nvit.prune(model, *rest, progress=stop_after(3))
    assert all(not layer._watches for layer in prunable_layers(model).values())


def test_a_run_state_of_another_model_is_refused(tmp_path):
    with pytest.raises(Stop):
        nvit.prune(*arguments(), out=tmp_path, progress=stop_after(3))
    with pytest.raises(ValueError, match="is of another model"):
        nvit.prune(*arguments("three_blocks"), out=tmp_path, resume=True)


def test_a_run_of_another_recipe_is_not_resumed(tmp_path):
    with pytest.raises(Stop):
        nvit.prune(*arguments(), out=tmp_path, progress=stop_after(5))
    with pytest.raises(ValueError, match=r"is of a run with lr 0\.05, this one has 0\.1\. Resume with the same recipe"):
        nvit.prune(*arguments(lr=0.1), out=tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops_at_the_step_and_keeps_the_last_good_state(tmp_path):
    _, _, settings, _ = arguments()
    order = [int(key[2]) for batch in loader(settings).epoch(0).__iter__()._index_sampler for key in batch]
    bad = frozenset(order[24:25])  # in the fourth batch of eight
    model, _, settings, table_ = arguments()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        nvit.prune(model, loader(settings, bad=bad), settings, table_, out=tmp_path / "run")
    tensors, values = load_run_state(tmp_path / "run" / "run_state.safetensors")
    assert values["trainer"]["step"] == 3
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    whole = nvit.prune(*arguments())
    resumed = nvit.prune(*arguments(), out=tmp_path / "run", resume=True)
    assert same(whole.masks, resumed.masks)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    model, data, settings, table = arguments()
    seen = []

    def at_the_third(grad):
        seen.append(weights(model))
        return grad * math.inf if len(seen) == 3 else grad

    model.blocks[1].mlp.fc1.bias.register_hook(at_the_third)
    with pytest.raises(FloatingPointError, match="a gradient is not finite at step 2"):
        nvit.prune(model, data, settings, table)
    assert same(seen[-1], weights(model))


def test_a_loss_that_is_no_number_while_scoring_names_the_batch():
    model, _, settings, table = arguments(train=False, criterion="fisher")
    with pytest.raises(FloatingPointError, match="the loss is nan on scoring batch 1"):
        nvit.prune(model, [(torch.full((2, 3, 16, 16), math.nan), torch.tensor([0, 1]))], settings, table)
    assert all(p.requires_grad for p in model.parameters())
