"""Whole runs: snapshots at their targets, criteria, limits, tables, and what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import nvit
from nvit import LatencyTable, PruneConfig, Pruner, adapters
from nvit.criteria.registry import CRITERIA
from nvit.latency import clock, measure
from nvit.structure import snapshot
from nvit.structure.masks import kept_counts, weight_masks, widths
from nvit.tasks.classification import Classification
from tests.hosts import TINY_HOSTS, images, labels, make
from tests.runs import arguments, assert_pruned_weights_are_zero, config, groups_of, loader, same, table, weights


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
    assert Classification(7).draw(torch.zeros(4, 7)).shape == (4,)


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


def test_a_table_of_this_machine_is_taken_in_the_mode_that_it_was_measured_in():
    """On a GPU that is graph replays, which no CPU has."""
    model, data, settings, table = arguments()
    here = clock.current_setting("cpu", torch.float32, 8, adapters.find(model).tokens(model))
    table.setting = dataclasses.replace(here, mode="graph")
    result = nvit.prune(model, data, dataclasses.replace(settings, measure_seconds=0.0), table)
    assert result.table.setting.mode == "graph"


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


def test_three_heads_of_one_shot_become_two_or_none():
    """The default bundle of two heads: the first to leave has 3 mod 2, so that what remains is even."""
    model, data, settings, table = arguments(train=False, bundle_heads=2, only=("heads",), latency_target=(0.9,))
    result = nvit.prune(model, data, settings, table)
    assert {kept_counts(result.masks)[f"blocks.{i}.heads"] for i in range(2)} <= {2, 3}
    assert widths(groups_of(model), result.masks) == snapshot.spec_of(result.model).blocks


def test_config_refuses_what_makes_no_sense():
    for bad, message in (
        ({"latency_target": (1.0,)}, r"latency_target 1 is not in \(0, 1\)"),
        ({"latency_target": (0.5, 0.0)}, r"latency_target 0 is not in \(0, 1\)"),
        ({"only": ("mpl",)}, "only: unknown value 'mpl'.*'mlp'"),
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
