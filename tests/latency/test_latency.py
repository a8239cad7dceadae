"""The table: exact where it counts, monotone, and refused for any other setting than its own."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nvit import adapters
from nvit.analysis.evaluate import macs
from nvit.latency import measure as measuring
from nvit.latency import table as table_module
from nvit.latency.clock import current_setting, time_each
from nvit.latency.grid import Grid
from nvit.latency.measure import LEVELS, points
from nvit.latency.table import LatencyTable
from nvit.spec import KINDS, BlockWidths, Part
from nvit.structure.compact import compact
from nvit.structure.masks import full_masks, widths
from tests.hosts import TINY_HOSTS, images, make, masks_for, prepared
from tests.tables import THREE_STAGES, VIT, blocks_of, parts_of, table_of

SMALL_BUNDLES = {"emb": 16, "heads": 1, "qk_dim": 8, "v_dim": 8, "mlp": 16}


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(measuring, "LEVELS", dict.fromkeys(KINDS, 2))


def measured(model, **more) -> LatencyTable:
    return LatencyTable.measure(model, 2, bundle_sizes=SMALL_BUNDLES, seconds=0.1, **more)


@pytest.mark.parametrize("host", [h for h in TINY_HOSTS if h != "no_classifier"])
def test_analytic_table_is_the_flop_counter(host):
    """Exact, since MACs are multilinear in the widths and the counter counts matrix products, the convolution, and
    nothing else. Table widths go down to one unit."""

    @settings(max_examples=3)
    @given(st.data())
    def check(data):
        model, groups = prepared(host)
        table = LatencyTable.analytic(model, dict.fromkeys(KINDS, 1))
        masks = data.draw(masks_for(groups))
        small = compact(model, groups, masks)
        counted = macs(small, images(model).shape[1:])
        assert table.model_ms(widths(groups, masks)) * 1e9 == pytest.approx(counted, rel=1e-9)

    check()


def test_macs_counts_what_the_model_runs():
    model = make("plain")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(model, 1))
    # On a CPU the counter sees attention's fused kernel only in eager's decomposed form; meta always does.
    attention = sum(2 * 3 * 5 * 5 * 16 for _ in model.blocks)
    counted = counter.get_total_flops() // 2
    assert macs(model, (3, 16, 16)) in (counted, counted + attention)


def table_by_hand(mlp=None) -> LatencyTable:
    """Three points an axis, for one block; random values, but `mlp` where given."""
    rng, block = np.random.default_rng(0), BlockWidths(8, 8, 8, 8, 8)
    adapter = adapters.FAMILIES["timm_vit"]
    parts = adapter.parts(adapter.prepare(make("plain", depth=1)))
    values = {p.name: rng.random([3] * len(p.kinds)) + 1 for p in parts}
    if mlp is not None:
        values |= {"mlp": mlp, "attention": np.zeros([3] * 4), "rest": np.zeros(3)}
    grids = {p.name: Grid(p.kinds, [[2, 4, 8]] * len(p.kinds), values[p.name]) for p in parts}
    return LatencyTable(parts, grids, [block], None)


WIDTH = st.integers(2, 8)


@given(st.lists(st.tuples(WIDTH, WIDTH, WIDTH, WIDTH, WIDTH), min_size=2, max_size=2))
def test_a_table_is_monotone_even_over_noise(pair):
    low, high = np.minimum(*np.array(pair)), np.maximum(*np.array(pair))
    table = table_by_hand()
    for name, at in table.at.items():
        assert table.grids[name](low[at])[0] <= table.grids[name](high[at])[0] + 1e-12


def test_a_table_interpolates_linearly_and_keeps_monotone_points():
    table = table_by_hand(mlp=np.array([[1.0, 2, 3], [2, 4, 6], [3, 6, 10]]))

    def at(emb, mlp):
        return table.model_ms([BlockWidths(emb, 8, 8, 8, mlp)])

    assert [at(2, 2), at(4, 4), at(8, 8)] == [1, 4, 10]
    assert at(3, 4) == pytest.approx(3) and at(8, 6) == pytest.approx(8) and at(3, 3) == pytest.approx(2.25)


@pytest.mark.parametrize(("kind", "width"), [("emb", 9), ("heads", 1), ("mlp", 10)])
def test_widths_outside_the_table_are_named(kind, width):
    inside = BlockWidths(8, 8, 8, 8, 8)
    with pytest.raises(ValueError, match=rf"{kind} width .*{width}.* lies outside the latency table's 2\.\.8"):
        table_by_hand().model_ms([replace(inside, **{kind: width})])


def test_a_model_is_the_sum_of_its_pieces():
    """Three stages added up by hand, at random widths; its parts have axes of their own."""
    table, rng = table_of(THREE_STAGES), np.random.default_rng(0)
    blocks = [BlockWidths(*(int(rng.integers(1, getattr(b, kind) + 1)) for kind in KINDS)) for b in table.dense]
    blocks[2] = replace(blocks[2], emb=blocks[1].emb)
    expected = 5 * blocks[0].emb + 4 * blocks[3].emb
    expected += 3 * blocks[0].emb * blocks[1].emb + 3 * blocks[2].emb * blocks[3].emb
    for b in blocks:
        expected += b.emb * b.heads * (2 * b.qk_dim + 2 * b.v_dim) + 2 * b.emb * b.mlp
    assert table.model_ms(blocks) == pytest.approx(expected)
    assert table.ratio(table.dense) == 1


def test_every_part_has_its_own_pieces_range_and_bundles():
    blocks, (*_, merge, _) = blocks_of(THREE_STAGES), parts_of(THREE_STAGES)
    bundles = [BlockWidths(emb=4, heads=2, qk_dim=4, v_dim=8, mlp=3)] * len(blocks)
    assert merge.name == "merge.0"
    assert points(merge, blocks, bundles, LEVELS) == [[4, 8], [4, 8, 11]]
    unlike = Part("mlp", ("emb", "mlp"), ((0, 0), (3, 3)))
    assert points(unlike, blocks, bundles, LEVELS) == [[4, 8, 12, 14], [3, 6, 8]]


def test_slopes_are_milliseconds_per_unit_and_for_a_stream_per_channel_of_every_block():
    """By hand from the cost of a block with everything else dense; all widths go down to one."""
    dense, depth = VIT[0][1], 2
    slopes = table_of(VIT, points=3).slopes()
    attention, dims = 2 * dense.qk_dim + 2 * dense.v_dim, 2 * dense.emb * dense.heads
    assert slopes["ms_per_mlp"] == pytest.approx(2 * dense.emb)
    assert slopes["ms_per_heads"] == pytest.approx(dense.emb * attention)
    assert slopes["ms_per_qk_dim"] == slopes["ms_per_v_dim"] == pytest.approx(dims)
    assert slopes["ms_per_emb"] == pytest.approx(depth * (dense.heads * attention + 2 * dense.mlp) + 5 + 4)
    table = table_of(THREE_STAGES)
    narrow = table.model_ms([replace(b, emb=1) for b in table.dense])
    units = sum(b.emb - 1 for b in table.dense) / 4
    assert table.slopes()["ms_per_emb"] == pytest.approx((table.dense_ms - narrow) / units)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [(((0, 0),), "leaves out"), (((0, 0), (1, 2)), "one of 2 blocks"), (((0,), (1,)), "one of 2 blocks")],
)
def test_parts_that_do_not_fit_the_blocks_are_refused(pieces, reason):
    table = table_of(VIT)
    parts = [Part(p.name, p.kinds, pieces) if p.name == "mlp.0" else p for p in table.parts]
    reason = r"no part of the latency table depends on mlp of block 1" if reason == "leaves out" else reason
    with pytest.raises(ValueError, match=reason):
        LatencyTable(parts, table.grids, table.dense, None)


@pytest.mark.parametrize("host", TINY_HOSTS)
def test_pieces_run_one_after_another_are_the_model(host):
    """The rest of a model without blocks gives its embedding's logits; with pieces as blocks, the model's own."""
    model, _ = prepared(host)
    x, adapter = images(model), adapters.find(model)
    parts = {p.name: p for p in adapter.parts(model)}
    expected = model(x)
    steps = []
    for i in range(len(model.blocks)):
        one = copy.deepcopy(model)
        one.blocks = one.blocks[i : i + 1]
        steps += [adapter.piece(one, parts[name]) for name in ("attention", "mlp")]
    rest, shape = adapter.piece(model, parts["rest"])
    assert x.shape[1:] == tuple(shape)
    seen = []
    model.blocks = nn.Sequential(*(_Call(run, seen) for run, _ in steps))
    torch.testing.assert_close(rest(x), expected)
    assert [tuple(s) for s in seen] == [tuple(shape) for _, shape in steps]


class _Call(nn.Module):
    """A function as a layer, noting its input's shape without the batch."""

    def __init__(self, run, seen: list) -> None:
        super().__init__()
        self.run, self.seen = run, seen

    def forward(self, x):
        self.seen.append(x.shape[1:])
        return self.run(x)


def test_measure_gives_a_usable_table_and_leaves_the_model_alone(few_points):
    model = make("plain")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    table = measured(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not hasattr(model, "dense_config"), "measuring prepared the user's own model"
    dense = [BlockWidths(48, 3, 16, 16, 96)] * 2
    assert table.dense == tuple(dense)
    assert table.setting == current_setting("cpu", torch.float32, 2, tokens=5)
    assert table.dense_ms > 0 and math.isfinite(table.dense_ms)
    smallest = [BlockWidths(16, 1, 8, 8, 16)] * 2
    assert 0 < table.model_ms(smallest) <= table.dense_ms
    table.check(table.setting, dense)


@pytest.mark.parametrize(
    "host", ["deit_distilled", "average_pooling", "clip", "odd_sizes", "no_position", "one_channel"]
)
def test_every_kind_of_model_can_be_measured(host, few_points):
    table = measured(make(host), dtype="float32")
    assert table.dense_ms > 0


def test_a_compact_model_can_be_measured(few_points):
    model, groups = prepared("plain")
    masks = full_masks(groups)
    masks["blocks.0.mlp"][:40] = False
    masks["blocks.1.heads"][0] = False
    small = compact(model, groups, masks)
    table = measured(small)
    assert table.dense == widths(groups, masks)


def test_time_each_takes_turns_and_skips_the_first_round():
    order = []
    times = time_each([lambda: order.append("a"), lambda: order.append("b")], "cpu", 0.0)
    assert order == ["a", "b"] * 2 and len(times) == 2 and all(t >= 0 for t in times)


def test_the_cache_is_used_the_second_time(few_points, tmp_path, monkeypatch):
    model = make("plain")
    first = measured(model, cache=tmp_path)
    monkeypatch.setattr(table_module, "differ", lambda *_: False)  # whatever the machine does meanwhile
    monkeypatch.setattr(table_module, "time_pieces", lambda *_: pytest.fail("measured again"))
    assert measured(model, cache=tmp_path).to_json() == first.to_json()
    with pytest.raises(pytest.fail.Exception):
        LatencyTable.measure(model, 3, bundle_sizes=SMALL_BUNDLES, seconds=0.1, cache=tmp_path)
    with pytest.raises(pytest.fail.Exception):
        measured(make("three_blocks"), cache=tmp_path)


def test_save_and_load_give_the_same_table(tmp_path, few_points):
    for table in (measured(make("plain")), LatencyTable.analytic(make("plain"), SMALL_BUNDLES)):
        table.save(tmp_path / "t.json")
        again = LatencyTable.load(tmp_path / "t.json")
        assert again.setting == table.setting and again.dense == table.dense
        blocks = [BlockWidths(30, 2, 9, 11, 50)] * 2
        assert again.model_ms(blocks) == pytest.approx(table.model_ms(blocks), abs=1e-5)
        assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


OTHERS = {"device": "H200", "dtype": "bfloat16", "batch_size": 4, "tokens": 197, "threads": 63}


@pytest.mark.parametrize("field", OTHERS)
def test_a_table_of_another_setting_is_refused(field):
    table = LatencyTable.analytic(make("plain"), SMALL_BUNDLES)
    setting = current_setting("cpu", torch.float32, 2, 5)
    table.setting = setting
    table.check(setting, table.dense)
    with pytest.raises(ValueError, match=rf"measured with {field.replace('_', ' ')} .* this run has {OTHERS[field]}"):
        table.check(replace(setting, **{field: OTHERS[field]}), table.dense)


def test_a_table_of_another_model_is_refused_and_another_version_is_not():
    table = LatencyTable.analytic(make("plain"), SMALL_BUNDLES)
    with pytest.raises(ValueError, match=r"latency table is for a model of 2 blocks.*this model has 3"):
        table.check(current_setting("cpu", torch.float32, 2, 5), [BlockWidths(48, 3, 16, 16, 96)] * 3)
    table.setting = current_setting("cpu", torch.float32, 2, 5)
    table.check(replace(table.setting, versions="torch 1.0"), table.dense)


def test_damaged_table_files_give_one_line(tmp_path):
    file = tmp_path / "table.json"
    text = LatencyTable.analytic(make("plain"), SMALL_BUNDLES).to_json()
    parts = json.loads(text)["parts"]
    wrong_parts = [
        {"mlp": parts["mlp"] | {"values": [1.0, 2.0]}},
        {"rest": parts["rest"] | {"axes": [[48, 16]], "values": [1.0, 2.0]}},
        {"rest": parts["rest"] | {"values": [float("nan"), 1.0]}},
        {"mlp": parts["mlp"] | {"pieces": [[0, 0]]}},
        {"mlp": parts["mlp"] | {"pieces": [[0, 0], [1, 2]]}},
        {"mlp": parts["mlp"] | {"pieces": [0, 1]}},
        {"mlp": parts["mlp"] | {"pieces": []}},
        {"mlp": parts["mlp"] | {"kinds": ["emb", "depth"]}},
        {"mlp": parts["mlp"] | {"axes": [[], []]}},
        {"mlp": []},
    ]
    raw = [json.loads(text) | {"parts": parts | wrong} for wrong in wrong_parts]
    raw += [json.loads(text) | {"parts": wrong} for wrong in ({}, [], 3)]
    raw.append({k: v for k, v in json.loads(text).items() if k != "parts"} | {"grids": {}})  # as older versions wrote
    damaged = [text[:100].encode(), b"\xff\xfe\x00", b"{}", b"[]", b"3", *(json.dumps(x).encode() for x in raw)]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a latency table") as e:
            LatencyTable.load(file)
        assert "\n" not in str(e.value), content


def test_unsupported_models_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"Linear is not supported.*Supported families"):
        LatencyTable.analytic(torch.nn.Linear(2, 2))
    assert adapters.FAMILIES


def test_analytic_counts_the_three_matrices_of_a_gated_mlp():
    model, _ = prepared("swiglu_packed")
    assert LatencyTable.analytic(model).dense_ms == pytest.approx(macs(model, (3, 16, 16)) / 1e9, rel=1e-9)
