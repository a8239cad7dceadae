"""Swin beyond what every family promises: groups, windows and images, pruning and latency by stage, refusals."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch.utils.flop_counter import FlopCounterMode

from nvit import LatencyTable, PruneConfig, adapters, prune
from nvit.criteria.gates import GateRecorder
from nvit.latency import measure as table_module
from nvit.prune.pruner import Pruner
from nvit.spec import KINDS
from nvit.structure import snapshot
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks, widths
from nvit.structure.skeleton import skeleton
from tests.families.swin import TINY, make
from tests.hosts import random_masks

ENTRYPOINTS = timm.list_models(module="swin_transformer")


def prepared(variant: str, **more):
    host = make(variant, **more)
    model = adapters.find(host).prepare(host)
    return model, adapters.find(model).groups(model)


@pytest.mark.parametrize("name", ENTRYPOINTS)
def test_every_entrypoint_is_grouped_cut_and_rebuilt(name):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1))
    before = model.state_dict().keys()
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    masks = {g.name: torch.arange(g.size) < (g.size + 1) // 2 for g in groups}
    small = compact(model, groups, masks)
    rebuilt = skeleton(adapter.spec(model, widths(groups, masks)))
    assert rebuilt.state_dict().keys() == before
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


def test_groups_of_swin_t_are_its_own():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    adapter = adapters.find(model)
    groups = {g.name: g for g in adapter.groups(adapter.prepare(model))}
    assert [n for n, g in groups.items() if g.kind == "emb"] == [f"layers.{s}.emb" for s in range(4)]
    assert [g.blocks for g in groups.values() if g.kind == "emb"] == [(0, 1), (2, 3), (4, 5, 6, 7, 8, 9), (10, 11)]
    assert groups["layers.2.blocks.1.mlp"].blocks == (5,) and groups["layers.2.emb"].divisor == 6
    blocks = widths(list(groups.values()), full_masks(list(groups.values())))
    assert [[getattr(blocks[i], kind) for kind in KINDS] for i in (0, 11)] == [
        [96, 3, 32, 32, 384],
        [768, 24, 32, 32, 3072],
    ]
    merge = {s.name: s for s in groups["layers.0.emb"].slices if "layers.1" in s.name}
    assert merge["layers.1.downsample.reduction.weight"].view == (192, 4, 96)
    assert merge["layers.1.downsample.norm.weight"].scored
    writes = next(s for s in groups["layers.1.emb"].slices if s.name == "layers.1.downsample.reduction.weight")
    assert writes.published and (writes.view, writes.axis) == ((192, 384), 0)


@pytest.mark.parametrize("variant", ["shifted", "padded", "always_partition"])
def test_gates_tell_images_apart_though_windows_are_folded_into_the_batch(variant):
    model, groups = prepared(variant)
    model.double().requires_grad_(False)
    masks = random_masks(groups, 0.7)
    apply_(model, groups, masks)
    x = torch.randn(3, *adapters.preprocess(model)["input_size"], dtype=torch.float64)
    y = torch.tensor([0, 1, 4])

    def gates(x, y):
        with GateRecorder(model, groups, masks) as recorder:
            F.cross_entropy(model(x), y, reduction="sum").backward()
        return recorder.pop()

    together = gates(x, y)
    for i in range(3):
        for name, alone in gates(x[i : i + 1], y[i : i + 1]).items():
            torch.testing.assert_close(together[name][i], alone[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_with_masked_windows(dtype, tmp_path):
    """Window masks are built in fp32 for a model from disk; the logits' dtype is the model's."""
    model, groups = prepared("shifted")
    small = compact(model, groups, random_masks(groups, 0.6))
    x = torch.randn(2, 3, 32, 32)
    exact = small(x).detach()
    snapshot.save(tmp_path / "s", small.to(dtype))
    again = snapshot.load(tmp_path / "s")
    assert next(again.parameters()).dtype == dtype
    assert float((again(x.to(dtype)).detach().float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


def table(model) -> LatencyTable:
    return LatencyTable.analytic(model, PruneConfig(bundle_heads=1, bundle_emb=2).bundle_sizes)


@pytest.mark.parametrize("train", [True, False])
def test_only_the_stages_asked_for_are_pruned(train):
    model, groups = prepared("three_stages")
    sizes = {"bundle_heads": 1, "bundle_emb": 2, "bundle_qk": 1, "bundle_v": 1, "bundle_mlp": 2}
    config = PruneConfig(latency_target=0.9, stages=(1,), train=train, batch_size=2, interval=1, **sizes)
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))]
    result = prune(model, data, config, LatencyTable.analytic(model, config.bundle_sizes))
    inside = {b for g in groups if g.name == "layers.1.emb" for b in g.blocks}
    assert inside == {1, 2}
    pruned = {g.name for g in groups if not bool(result.masks[g.name].all())}
    assert pruned and pruned <= {g.name for g in groups if inside.issuperset(g.blocks)}


def test_a_stage_that_does_not_exist_is_refused():
    model, _ = prepared("shifted")
    with pytest.raises(ValueError, match="there is no stage 2; this model has the stages 0 to 1"):
        Pruner(model, table(model), PruneConfig(stages=(1, 2)))
    with pytest.raises(ValueError, match="nothing is left"):
        Pruner(model, table(model), PruneConfig(stages=(1,), freeze=("layers.1.*",)))


@pytest.mark.parametrize("variant", ["three_stages", "padded", "always_partition", "double_pooling"])
def test_pieces_do_the_work_of_the_model(variant):
    """At full width the samples' pieces are as many MACs as the parts say they have in the model."""
    model, _ = prepared(variant)
    adapter = adapters.find(model)
    every = adapter.parts(model)
    assert sorted(b for p in every if p.name.startswith(("attention", "shifted")) for b, *_ in p.pieces) == [
        *range(sum(len(stage.blocks) for stage in model.layers))
    ]
    spec = snapshot.spec_of(model)
    for part in every:
        full = [getattr(spec.blocks[b], kind) for b, kind in zip(part.pieces[0], part.kinds, strict=True)]
        sample = adapter.sample_spec(spec, part, full)
        (narrow,) = table_module._narrow(adapter, [sample])
        run, shape = adapter.piece(narrow.to("meta"), part)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(torch.empty(1, *shape, device="meta"))
        assert counter.get_total_flops() == 2 * adapter.part_macs(model, part)(*full), part.name
        if part.name.startswith("shifted"):
            assert any(narrow.layers[-1].blocks[-1].shift_size)


def test_a_measured_table_covers_every_stage(monkeypatch):
    monkeypatch.setattr(table_module, "LEVELS", dict.fromkeys(KINDS, 2))
    model, groups = prepared("shifted")
    before = copy.deepcopy(model.state_dict())
    found = LatencyTable.measure(model, 2, seconds=0.1, bundle_sizes=dict.fromkeys(KINDS, 1))
    assert found.dense_ms > 0 and found.ratio(widths(groups, random_masks(groups, 0.5))) <= 1
    assert list(found.grids) == [p.name for p in adapters.find(model).parts(model)]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strict_img_size": False}, "images of varying size"),
        ({"depths": (2, 0)}, "no blocks in stage 1"),
        ({"norm_layer": type("OddNorm", (torch.nn.LayerNorm,), {})}, "norm type OddNorm in the patch embedding"),
    ],
)
def test_what_is_unknown_is_refused_with_its_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        adapters.find(SwinTransformer(**TINY | change))


def test_windows_that_were_moved_are_refused_and_resized_ones_are_rebuilt():
    model = SwinTransformer(**TINY | {"depths": (2, 2)})
    model.layers[0].blocks[1].shift_size = (1, 2)
    with pytest.raises(ValueError, match=r"windows shifted by \(1, 2\) instead of \(2, 2\) in block 1"):
        adapters.find(model)
    model = make("shifted")
    model.set_input_size(img_size=(40, 24), window_size=(5, 3))
    plain = copy.deepcopy(model)
    adapter = adapters.find(model)
    spec = snapshot.spec_of(adapter.prepare(model))
    rebuilt = adapter.build(spec, "cpu")
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 40, 24)
    torch.testing.assert_close(rebuilt.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="before it is prepared"):
        model.set_input_size(img_size=(80, 48))


def test_its_second_version_is_another_family():
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256")
    with pytest.raises(ValueError, match="SwinTransformerV2 is not supported"):
        adapters.find(model)
