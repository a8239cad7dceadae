"""The paper's ablations in small: attention pruned without head alignment, arms of a table, rows that are kept."""

import copy
import csv
from dataclasses import replace

import pytest
import torch

import nvit
from benchmarks.accuracy import ablations
from benchmarks.accuracy.ablation_arms import ARMS, OURS, PADDED, Arm, difference
from benchmarks.accuracy.ablation_data import HardLabels, Pixels
from benchmarks.accuracy.ablation_runs import Bench, PerStructure, Scale, run
from benchmarks.accuracy.paired import bits
from benchmarks.accuracy.ragged import padded, padded_masks, ragged, ragged_table
from nvit import adapters
from nvit.spec import KINDS
from nvit.structure.masks import apply_, full_masks, widths
from tests.hosts import images, prepared

FINE = {f"bundle_{k}": 1 for k in ("emb", "heads", "qk", "v", "mlp")}
BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def bench():
    dense, _ = prepared("plain")
    x, y = images(dense, 48), torch.arange(48) % 7
    pairs = list(zip(x, y.tolist(), strict=True))
    scale = Scale(
        size=16, each=4, dense_each=4, dense_epochs=1, evaluate_each=2, batch=8, steps=9, interval=2, bundles=4,
        calibration=16, amp="no",
    )  # fmt: skip
    table = nvit.LatencyTable.analytic(dense, dict.fromkeys(KINDS, 1))
    return Bench(scale, dense.eval(), pairs[:32], pairs[32:], table, HardLabels(copy.deepcopy(dense), 16))


def ragged_half(dense):
    """The dense model without alignment, masked at random; a head loses all of its value dims."""
    model = ragged(dense)
    groups = adapters.find(model).groups(model)
    g = torch.Generator().manual_seed(1)
    masks = {k.name: torch.rand(k.size, generator=g) < 0.5 for k in groups}
    masks["blocks.0.v_dim"][:16] = False
    apply_(model, groups, masks)
    return model, masks


@torch.no_grad()
def test_a_ragged_model_is_the_dense_one_until_dims_leave_and_padded_computes_what_it_does(bench):
    x = images(bench.dense, 3)
    torch.testing.assert_close(ragged(bench.dense)(x), bench.dense(x), rtol=0, atol=1e-5)
    model, masks = ragged_half(bench.dense)
    small = padded(model, bench.dense, masks)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5 * float(model(x).abs().max()))
    first, second = nvit.snapshot.spec_of(small).blocks
    assert (first.heads, second.heads) == (2, 3), "a head without values has left"
    widest = masks["blocks.1.qk_dim"].view(3, -1).sum(1).max()
    assert second.qk_dim == widest and widest > masks["blocks.1.qk_dim"].sum() / 3


def test_padding_stays_zero_in_training(bench):
    model, masks = ragged_half(bench.dense)
    small = padded(model, bench.dense, masks)
    zero = {n: p == 0 for n, p in small.named_parameters() if "attn" in n}
    assert sum(int(z.sum()) for z in zero.values()) > 0
    loader = nvit.data.TrainingData(bench.train, 8)
    nvit.finetune(small.train(), loader, nvit.FinetuneConfig(epochs=1, batch_size=8, distill_weight=0, lr=0.1))
    for name, p in small.named_parameters():
        if name in zero:
            assert not p[zero[name]].any(), name


def test_the_table_without_alignment_is_that_of_even_heads(bench):
    dense = bench.dense
    table = ragged_table(bench.table, 3)
    assert table.dense_ms == pytest.approx(bench.table.dense_ms)
    aligned, model = adapters.find(dense).groups(dense), ragged(dense)
    groups = adapters.find(model).groups(model)
    masks = full_masks(groups)
    masks["blocks.0.qk_dim"] = (torch.arange(16) < 8).repeat(3)
    even = table.ratio(widths(groups, masks))
    assert even == pytest.approx(bench.table.ratio(widths(aligned, padded_masks(aligned, masks, 3)))) and even < 1
    masks["blocks.0.qk_dim"] = torch.arange(48) < 24  # as many, all of them in one head and a half
    assert table.ratio(widths(groups, masks)) == pytest.approx(even)
    assert bench.table.ratio(widths(aligned, padded_masks(aligned, masks, 3))) == 1


def test_per_structure_the_share_that_is_gone_is_the_same_in_every_kind(bench):
    config = nvit.PruneConfig(
        latency_target=0.1, bundles_per_step=40, latency_weight=0.0, criterion="magnitude", measure_seconds=0,
        **FINE,
    )  # fmt: skip
    pruner = PerStructure(copy.deepcopy(bench.dense), bench.table, config)
    for _ in range(2):
        pruner.score_weights()
        pruner.decide()
    gone = {}
    for kind in KINDS:
        every = torch.cat([pruner.masks[g.name] for g in pruner.groups if g.kind == kind])
        gone[kind] = 1 - float(every.float().mean())
    assert sum(int((~m).sum()) for m in pruner.masks.values()) == 80
    del gone["heads"]  # of six units in steps of a sixth
    assert max(gone.values()) - min(gone.values()) < 0.05, gone


@pytest.mark.parametrize("name", [OURS, "concatenated dims", "+ unpruned teacher + hard labels",
                                  "magnitude, per structure", "one shot, remaining, refit"])  # fmt: skip
def test_every_arm_ends_at_the_target_after_equal_steps(bench, name, monkeypatch):
    trained = []
    finetune = nvit.finetune

    def counted(model, loader, config, **more):
        trained.append(round(config.epochs * len(loader)))
        return finetune(model, loader, config, **more)

    monkeypatch.setattr(nvit, "finetune", counted)
    small = replace(bench, scale=replace(bench.scale, bundles=400))  # one decision is enough
    arm = BY_NAME[name]
    rows = list(run(small, replace(arm, settings={**arm.settings, **FINE}), seed=0))
    assert [r["arm"] for r in rows] == ([name] if arm.align else [name, name + PADDED])
    assert [r["pruning_steps"] + t for r, t in zip(rows, trained, strict=True)] == [9] * len(rows)
    last = rows[-1]
    assert 0.4 < last["predicted_ratio"] <= 0.5 and last["macs"] == pytest.approx(last["predicted_ratio"], abs=0.1)
    assert last["images"] == 16 and all(0 < last[f"kept_{k}"] <= 1 for k in KINDS)
    assert arm.align or rows[0]["predicted_ratio"] > 0.5, "heads of other widths are padded to the widest"


def test_hard_labels_are_asked_for_once(bench, tmp_path):
    file = tmp_path / "labels.safetensors"
    teacher, x = HardLabels(copy.deepcopy(bench.dense), 16, file), images(bench.dense, 4)
    teacher.keep()
    assert not file.exists(), "nothing to keep yet"
    first = teacher(x)
    assert torch.equal(first.argmax(1), bench.dense(x).argmax(1)) and torch.equal(first.sum(1), torch.ones(4))
    teacher.keep()
    again = HardLabels(torch.nn.Identity(), 16, file)
    again.model.num_classes = 7
    assert torch.equal(again(x.flip(0)), first.flip(0))


def test_images_of_class_folders(tmp_path):
    from PIL import Image

    for name, level in (("n1", 0), ("n0", 255)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (8, 8), level).save(tmp_path / name / f"{i}.png")
    config = {"input_size": (3, 4, 4), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    pixels = Pixels(tmp_path, 2, config, first=1)
    assert pixels.names == ["n0", "n1"] and [y for _, y in pixels] == [0, 0, 1, 1]
    assert pixels[0][0].shape == (3, 4, 4) and float(pixels[0][0].mean()) == 2 and float(pixels[3][0].mean()) == -2


def test_rows_that_a_file_has_are_not_measured_again(bench, tmp_path, monkeypatch):
    asked = []

    def fake(bench, arm, seed):
        asked.append((arm.name, seed))
        for name in arm.rows:
            yield {"table": arm.table, "arm": name, "seed": seed, "images": 4, "right": bits(torch.ones(4))}

    monkeypatch.setattr(ablations, "run", fake)
    arms = [Arm(name=OURS, table=""), Arm(name="b", table="t", align=False)]
    ablations.fill(bench, arms, [0], 1e9, tmp_path)
    ablations.fill(bench, arms, [0, 1], 1e9, tmp_path)
    assert asked == [(OURS, 0), ("b", 0), (OURS, 1), ("b", 1)]
    ablations.fill(bench, arms, [2], 0, tmp_path)
    assert len(asked) == 4, "no time is left"
    with (tmp_path / "ablations_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and difference(rows, "b").mean == 0 and difference(rows, "c") is None
