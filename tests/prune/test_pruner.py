"""Whole runs: targets, criteria, limits, resumption, bad numbers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import nvit
from nvit import LatencyTable, PruneConfig, Pruner
from nvit.criteria.gradients import unit_saliency
from nvit.criteria.registry import CRITERIA
from nvit.latency import clock, measure
from nvit.layers import prunable_layers
from nvit.structure import snapshot
from nvit.structure.masks import full_masks, kept_counts, weight_masks, widths
from nvit.structure.run_state import load_run_state
from nvit.training.distill import sample_labels
from tests.hosts import TINY_HOSTS, images, labels, make
from tests.runs import Stop, arguments, config, loader, stop_after, table

KILLED_RUNS = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
import nvit
from tests.runs import arguments

root = Path(sys.argv[1])

def run(name):
    model, loader, config, table = arguments(bundles_per_step=1, interval=3)
    result = nvit.prune(model, loader, config, table, out=root / name, resume=True)
    tensors = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    tensors |= {f"mask.{n}": m for n, m in result.masks.items()}
    for i, s in enumerate(result.snapshots):
        tensors |= {f"snapshot{i}.{n}": p.detach().clone() for n, p in s.model.named_parameters()}
    save_file(tensors, root / f"{name}.part")
    os.replace(root / f"{name}.part", root / f"{name}.safetensors")

def child(name):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(name)
            code = 0
        finally:
            os._exit(code)
    return pid

start = time.monotonic()
pid = child("whole")
assert os.waitpid(pid, 0)[1] == 0
seconds = time.monotonic() - start
draw, kills = random.Random(int(sys.argv[2])), 0
for _ in range(60):
    pid = child("killed")
    time.sleep(draw.uniform(0.04, 0.18) * seconds if kills < 6 else 0)
    if kills < 6:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        assert status == 0
        break
print(kills, seconds)
"""


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_pruned_weights_are_zero(model, groups, masks):
    params = dict(model.named_parameters())
    for name, dims in weight_masks(params, groups, masks).items():
        for d, keep in enumerate(dims):
            if keep is not None:
                gone = params[name].index_select(d, (~keep).nonzero().squeeze(1))
                assert not gone.any(), f"{name}: a pruned weight came back"


def groups_of(model):
    return nvit.adapters.find(model).groups(model)


@pytest.mark.parametrize("train", [True, False])
def test_several_targets_in_one_run_leave_a_snapshot_at_each(train, tmp_path):
    model, data, settings, table = arguments(latency_target=(0.5, 0.85, 0.7), train=train)
    result = nvit.prune(model, data, settings, table, out=tmp_path)
    assert [s.target for s in result.snapshots] == [0.85, 0.7, 0.5]
    before = 1.0
    for s in result.snapshots:
        folder = tmp_path / f"target-{s.target:g}"
        spec, loaded = snapshot.load_spec(folder), nvit.load(folder)
        assert s.predicted_ratio == pytest.approx(table.ratio(spec.blocks)) and s.predicted_ratio <= s.target < before
        before = s.predicted_ratio
        assert torch.equal(loaded(images(loaded)), s.model(images(loaded)))
        metrics = snapshot.load_metrics(folder)
        assert metrics["target"] == s.target and metrics["predicted_ratio"] == s.predicted_ratio
    assert result.model is result.snapshots[-1].model
    assert [h["predicted_ratio"] for h in result.history] == sorted(
        (h["predicted_ratio"] for h in result.history), reverse=True
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers", "average_pooling", "clip"])
def test_the_masked_model_computes_what_the_last_snapshot_does(host, train, tmp_path):
    model, data, settings, table = arguments(host, train=train)
    dense = weights(model)
    result = nvit.prune(model, data, settings, table)
    x = images(model)
    with torch.no_grad():
        expected = model.eval()(x)
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(result.model(x), expected, rtol=0, atol=atol)
        loaded = nvit.load(result.save(tmp_path / "s"))
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=atol)
    assert_pruned_weights_are_zero(model, groups_of(model), result.masks)
    assert same(dense, weights(result.dense)), "the teacher was trained"
    kept = weight_masks(dense, groups_of(model), result.masks)
    moved = any(not torch.equal(p, dense[n]) for n, p in weights(model).items() if n not in kept)
    assert moved == train


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_and_leaves_nothing_behind(criterion, train):
    model, data, settings, table = arguments("deit_distilled", criterion=criterion, train=train)
    if train and not CRITERIA[criterion].capabilities.training:
        with pytest.raises(ValueError, match=f"criterion {criterion} is for pruning without training"):
            nvit.prune(model, data, settings, table)
        return
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    result = nvit.prune(model, data, settings, table)
    assert result.snapshots[-1].predicted_ratio <= 0.5
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    for found in (model, *(s.model for s in result.snapshots)):
        assert all(not getattr(m, "_watches", None) for m in found.modules()), "gates are still being read"
        F.cross_entropy(found(images(model)), labels(model, 3)).backward()


@pytest.mark.parametrize("host", [h for h in TINY_HOSTS if h != "no_classifier"])
def test_every_kind_of_model_is_pruned_in_one_shot(host):
    settings = config(train=False, score_batches=1, latency_target=(0.75,))
    model = make(host)
    batches = [(images(model, 4, seed=s), labels(model, 4)) for s in range(2)]
    result = nvit.prune(model, batches, settings, table(model, settings))
    assert result.snapshots[0].predicted_ratio <= 0.75
    with torch.no_grad():
        expected = model(images(model))
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(result.model(images(model)), expected, rtol=0, atol=atol)


def test_the_criterion_decides():
    found = {}
    for criterion in CRITERIA:
        model, data, settings, table = arguments(criterion=criterion, train=False)
        found[criterion] = nvit.prune(model, data, settings, table).masks
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not same(found[a], found[b]), f"{a} and {b} decide alike"


def test_labels_of_the_model_itself_can_be_scored():
    runs = []
    for _ in range(2):
        model, data, settings, table = arguments(train=False, labels="sampled")
        runs.append(nvit.prune(model, data, settings, table).masks)
    assert same(*runs), "drawn labels follow the seed"
    assert sample_labels(torch.zeros(4, 7)).shape == (4,)


def test_one_shot_in_rounds_scores_anew_and_meets_the_target():
    model, data, settings, table = arguments(train=False, rounds=4, latency_target=(0.5,))
    result = nvit.prune(model, data, settings, table)
    ratios = [h["predicted_ratio"] for h in result.history]
    assert len(ratios) == 4
    for step, ratio in enumerate(ratios, start=1):
        assert ratio <= 1 - 0.5 * step / 4 + 1e-9
    assert ratios[-1] <= 0.5


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({"only": ("mlp",)}, lambda g: g.kind == "mlp"),
        ({"only": ("qk_dim", "v_dim")}, lambda g: g.kind in ("qk_dim", "v_dim")),
        ({"freeze": ("blocks.0.*",)}, lambda g: not g.name.startswith("blocks.0.")),
        ({"freeze": ("emb", "*.heads")}, lambda g: g.kind not in ("emb", "heads")),
        ({"only": ("mlp", "heads"), "freeze": ("blocks.1.*",)}, lambda g: g.name in ("blocks.0.mlp", "blocks.0.heads")),
    ],
)
def test_limits_are_kept(limits, free, train):
    model, data, settings, table = arguments(latency_target=(0.9,), train=train, **limits)
    result = nvit.prune(model, data, settings, table)
    for g in groups_of(model):
        assert free(g) or bool(result.masks[g.name].all()), f"{g.name} was pruned"
    assert not all(bool(m.all()) for m in result.masks.values())


def test_limits_that_make_no_sense_are_refused():
    model = make("plain")
    for limits, message in (
        ({"freeze": ("blocks.7.*",)}, r"freeze: 'blocks\.7\.\*' matches no group"),
        ({"only": ("emb",), "freeze": ("emb",)}, "nothing is left to prune"),
    ):
        settings = config(**limits)
        with pytest.raises(ValueError, match=message):
            Pruner(model, table(model, settings), settings)


@pytest.mark.parametrize("train", [True, False])
def test_a_target_out_of_reach_says_so_and_saves_nothing(train, tmp_path):
    model, data, settings, table = arguments(latency_target=(0.05,), only=("mlp",), train=train, bundles_per_step=9)
    with pytest.raises(ValueError, match="target"):
        nvit.prune(model, data, settings, table, out=tmp_path / "run")
    assert not list(tmp_path.glob("run/target-*"))


def test_a_table_of_another_model_is_refused():
    model, data, settings, _ = arguments()
    with pytest.raises(ValueError, match=r"[Mm]easure"):
        nvit.prune(model, data, settings, table(make("three_blocks"), settings))


def test_a_table_of_another_machine_is_refused():
    model, data, settings, table = arguments()
    table.setting = clock.Setting("another CPU", "float32", 8, 5, 1, "torch")
    with pytest.raises(ValueError, match="latency table was measured with device another CPU"):
        nvit.prune(model, data, settings, table)


def test_without_a_table_one_is_measured(monkeypatch):
    monkeypatch.setattr(measure, "LEVELS", dict.fromkeys(nvit.spec.KINDS, 2))
    measured = LatencyTable.measure.__func__
    monkeypatch.setattr(
        LatencyTable, "measure", classmethod(lambda cls, *a, **k: measured(cls, *a, **(k | {"seconds": 0.05})))
    )
    settings, model = (
        config(train=False, latency_target=(0.9,), measure_seconds=0.0),
        make("plain", img_size=64, embed_dim=96, mlp_ratio=4.0),
    )
    result = nvit.prune(model, [(images(model, 8), labels(model, 8))], settings)
    assert result.table.setting.batch_size == settings.batch_size and result.snapshots[0].predicted_ratio <= 0.9


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_loop_by_hand_prunes_and_never_revives_a_weight():
    settings = config(latency_target=(0.6,), interval=3)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, ratios = list(loader(settings)), [1.0]
    for step in range(200):
        x, y = data[step % len(data)]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        met = pruner.step()
        optimizer.zero_grad()
        assert_pruned_weights_are_zero(model, pruner.groups, pruner.masks)
        assert (pruner.ratio < ratios[-1]) == ((step + 1) % 3 == 0), "decisions come when due, and only then"
        ratios.append(pruner.ratio)
        if pruner.done:
            break
    assert met == [0.6] and ratios[-1] <= 0.6 < ratios[-2]
    small, x = pruner.compact(), images(model)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Momentum goes on after pruning: the optimiser's own state must not bring a weight back.
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert pruner.step() == []
        optimizer.zero_grad()
        assert_pruned_weights_are_zero(model, pruner.groups, pruner.masks)


def by_hand(batches, settings, targets, rounds=1):
    """One shot written out: the pruner, its scores at every decision."""
    model, decided = make("plain"), []
    pruner = Pruner(model, table(model, settings), settings)
    for target in targets:
        start = pruner.ratio
        for r in range(1, rounds + 1):
            for x, y in batches:
                pruner.score(x, y if CRITERIA[settings.saliency].capabilities.labels else None)
            decided.append(pruner.scores())
            pruner.decide_at(start + (target - start) * r / rounds)
    return pruner, decided


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("criterion", ["auto", *CRITERIA])
def test_one_shot_by_hand_decides_as_prune_does(criterion, rounds):
    """Bit for bit, with every criterion; those with a signal of their own are given no labels."""
    settings = config(train=False, criterion=criterion, rounds=rounds)
    model, batches = make("plain"), list(loader(settings))
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    result = nvit.prune(model, batches, settings, table(model, settings))
    pruner, _ = by_hand(batches, settings, (0.8, 0.5), rounds)
    assert same(pruner.masks, result.masks) and same(weights(pruner.model), weights(model))
    assert pruner.history == result.history and pruner.met == [0.8, 0.5] and pruner.done
    assert {n: p.requires_grad for n, p in pruner.model.named_parameters()} == trainable
    assert all(p.grad is None for p in pruner.model.parameters())
    assert all(not layer._watches for layer in prunable_layers(pruner.model).values())
    assert same(weights(pruner.compact()), weights(result.model))


@pytest.mark.parametrize("criterion", [name for name, c in CRITERIA.items() if c.capabilities.training])
def test_a_backward_pass_of_ones_own_is_observed_without_training(criterion):
    """Cross entropy sent backward by hand says what `score` does, decision after decision."""
    settings = config(train=False, criterion=criterion)
    batches = list(loader(settings))[:2]
    expected, decided = by_hand(batches, settings, (0.8, 0.5))
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    for target, scores in zip((0.8, 0.5), decided, strict=True):
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pruner.observe()
        for name, s in pruner.scores().items():
            # From weights or from activations: sums of the same products in another order.
            torch.testing.assert_close(s, scores[name], rtol=1e-4, atol=1e-5 * float(scores[name].max()))
        pruner.decide_at(target)
    assert pruner.done and pruner.met == expected.met


@pytest.mark.parametrize("criterion", ["fisher", "hessian", "nvit", "curvature"])
def test_a_batch_that_cannot_be_scored_by_hand_leaves_nothing_behind(criterion):
    settings = config(train=False, criterion=criterion)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    x, y = images(model, 4), labels(model, 4)
    pruner.score(x, y)
    before = pruner.scores()
    with pytest.raises(FloatingPointError, match=r"is nan on scoring batch 2|not finite on calibration batch 2"):
        pruner.score(torch.full_like(x, math.nan), y)
    assert all(not layer._watches for layer in prunable_layers(model).values())
    assert all(p.requires_grad for p in model.parameters())
    assert same(pruner.scores(), before)
    pruner.score(x, y)  # and it goes on
    pruner.decide_at(0.5)
    assert pruner.done


def test_labels_are_asked_for_by_those_who_read_them():
    for criterion, c in CRITERIA.items():
        for drawn in (False, True):
            settings = config(train=False, criterion=criterion, labels="sampled" if drawn else "true")
            model = make("plain")
            pruner = Pruner(model, table(model, settings), settings)
            if c.capabilities.labels and not drawn:
                with pytest.raises(ValueError, match=f"criterion {criterion} reads labels, and none came"):
                    pruner.score(images(model))
            else:
                pruner.score(images(model))
                assert pruner.scores().keys() == {g.name for g in pruner.free}


def test_saliency_of_a_step_is_the_loss_gradients_own():
    settings = config(momentum=0.0)
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    pruner.step()
    for g in pruner.groups:
        expected = unit_saliency(g, dict(model.named_parameters()), grads)
        torch.testing.assert_close(pruner.mean.value()[g.name], expected)


def test_an_infinite_gradient_by_hand_is_named_and_changes_no_mask():
    settings = config()
    model = make("plain")
    pruner = Pruner(model, table(model, settings), settings)
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    model.blocks[0].mlp.fc2.weight.grad[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"saliency is not finite"):
        pruner.step()
    assert same(pruner.masks, full_masks(pruner.groups))


def test_three_heads_of_one_shot_become_two_or_none():
    """The default bundle of two heads: the first to leave has 3 mod 2, so that what remains is even."""
    model, data, settings, table = arguments(train=False, bundle_heads=2, only=("heads",), latency_target=(0.9,))
    result = nvit.prune(model, data, settings, table)
    assert {kept_counts(result.masks)[f"blocks.{i}.heads"] for i in range(2)} <= {2, 3}
    assert widths(groups_of(model), result.masks) == snapshot.spec_of(result.model).blocks


# --- interrupted ------------------------------------------------------------------------------------------------------


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
    command = [sys.executable, "-c", KILLED_RUNS, str(tmp_path), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 3, "the run was over before it could be killed"
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert same(whole, killed)
    leftover = [p.name for p in (tmp_path / "killed").iterdir() if not p.name.startswith(".")]
    assert sorted(leftover) == ["run_state.safetensors", "target-0.5", "target-0.8"]


def test_a_run_state_of_another_model_is_refused(tmp_path):
    with pytest.raises(Stop):
        nvit.prune(*arguments(), out=tmp_path, progress=stop_after(3))
    with pytest.raises(ValueError, match="is of another model"):
        nvit.prune(*arguments("three_blocks"), out=tmp_path, resume=True)


# --- bad numbers ------------------------------------------------------------------------------------------------------


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


def test_config_refuses_what_makes_no_sense():
    for bad, message in (
        ({"latency_target": (1.0,)}, r"latency_target 1 is not in \(0, 1\)"),
        ({"latency_target": (0.5, 0.0)}, r"latency_target 0 is not in \(0, 1\)"),
        ({"only": ("mpl",)}, "unknown kind 'mpl'.*'mlp'"),
        (
            {"criterion": "hesian"},
            "criterion: unknown value 'hesian'.*'hessian'.*expected one of auto, curvature, remaining, hes",
        ),
        ({"labels": "drawn"}, "labels: unknown value 'drawn'; expected one of true, sampled"),
        ({"score_batches": -1}, "score_batches is -1; it must be at least 1, or 0 for as many as --images says"),
        ({"images": -1}, "images is -1; it must be at least 1, or 0 for all images"),
        ({"measure_seconds": -1.0}, "measure_seconds is -1; it must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model = make("plain")
            Pruner(model, LatencyTable.analytic(model), PruneConfig(**bad))


@pytest.mark.parametrize("criterion", ["curvature", "remaining"])
def test_a_loss_of_ones_own_says_nothing_to_a_criterion_with_its_own_signal(criterion):
    model = make("plain")
    pruner = Pruner(model, LatencyTable.analytic(model), PruneConfig(train=False, criterion=criterion))
    F.cross_entropy(model(images(model)), labels(model, 3)).backward()
    for observe in (pruner.observe, pruner.step):
        with pytest.raises(ValueError, match=rf"criterion {criterion} sends a signal of its own.*call score\(images\)"):
            observe()


def test_a_run_of_another_recipe_is_not_resumed(tmp_path):
    with pytest.raises(Stop):
        nvit.prune(*arguments(), out=tmp_path, progress=stop_after(5))
    with pytest.raises(ValueError, match=r"is of a run with lr 0\.05, this one has 0\.1\. Resume with the same recipe"):
        nvit.prune(*arguments(lr=0.1), out=tmp_path, resume=True)


def test_an_interrupted_run_leaves_no_taps_on_the_model(tmp_path):
    model, *rest = arguments(criterion="abs")
    with pytest.raises(Stop):
        nvit.prune(model, *rest, progress=stop_after(3))
    assert all(not layer._watches for layer in prunable_layers(model).values())


def test_frozen_weights_do_not_score_and_nothing_else_is_lost():
    """What is frozen gives no evidence; a group is refused only where nothing is left to score it."""
    settings = config(latency_target=(0.8,), only=("mlp", "emb"), interval=2, criterion="nvit")
    model = make("plain")
    model.patch_embed.proj.weight.requires_grad_(False)
    model.blocks[0].mlp.fc1.bias.requires_grad_(False)
    result = nvit.prune(model, loader(settings), settings, table(model, settings))
    assert len(result.history) and result.snapshots[0].predicted_ratio <= 0.8
    model = make("plain")
    for p in model.blocks[0].mlp.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: nothing scores it"):
        nvit.prune(model, loader(settings), settings, table(model, settings))
