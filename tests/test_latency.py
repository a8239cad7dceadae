"""The table: exact where it counts, monotone, and refused for any other setting than its own."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nvit import adapters, latency
from nvit.evaluate import macs
from nvit.latency import LatencyTable, current_setting, time_each
from nvit.masks import compact, full_masks, widths
from nvit.spec import KINDS, BlockWidths
from tests.hosts import TINY_HOSTS, images, make, masks_for, prepared

SMALL_BUNDLES = {"emb": 16, "heads": 1, "qk_dim": 8, "v_dim": 8, "mlp": 16}


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(latency, "LEVELS", dict.fromkeys(KINDS, 2))


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


def table_by_hand() -> LatencyTable:
    axes = {kind: [2, 4, 8] for kind in KINDS}
    rng = np.random.default_rng(0)

    def grid(kinds):
        return {k: axes[k] for k in kinds}, rng.random([3] * len(kinds)) + 1

    return LatencyTable(
        {part: grid(kinds) for part, kinds in latency.PARTS.items()}, [BlockWidths(8, 8, 8, 8, 8)], None
    )


WIDTH = st.integers(2, 8)


@given(st.lists(st.tuples(WIDTH, WIDTH, WIDTH, WIDTH, WIDTH), min_size=2, max_size=2))
def test_a_table_is_monotone_even_over_noise(pair):
    low, high = np.minimum(*np.array(pair)), np.maximum(*np.array(pair))
    table = table_by_hand()
    assert table.block_ms(low[None])[0] <= table.block_ms(high[None])[0] + 1e-12
    assert table.rest_ms(low[:1])[0] <= table.rest_ms(high[:1])[0] + 1e-12


def test_a_table_interpolates_linearly_and_keeps_monotone_points():
    table = table_by_hand()
    axes, values = {"emb": [2, 4, 8], "mlp": [2, 4, 8]}, np.array([[1.0, 2, 3], [2, 4, 6], [3, 6, 10]])
    raw = json.loads(table.to_json())
    raw["grids"]["mlp"] = {"axes": axes, "values": values.tolist()}
    raw["grids"]["attention"]["values"] = np.zeros((3, 3, 3, 3)).tolist()
    exact = LatencyTable({p: (g["axes"], np.array(g["values"])) for p, g in raw["grids"].items()}, table.dense, None)

    def at(emb, mlp):
        return exact.block_ms(np.array([[emb, 8, 8, 8, mlp]]))[0]

    assert [at(2, 2), at(4, 4), at(8, 8)] == [1, 4, 10]
    assert at(3, 4) == pytest.approx(3) and at(8, 6) == pytest.approx(8) and at(3, 3) == pytest.approx(2.25)


@pytest.mark.parametrize(("kind", "width"), [("emb", 9), ("heads", 1), ("mlp", 10)])
def test_widths_outside_the_table_are_named(kind, width):
    inside = BlockWidths(8, 8, 8, 8, 8)
    with pytest.raises(ValueError, match=rf"{kind} width .*{width}.* lies outside the latency table's 2\.\.8"):
        table_by_hand().model_ms([replace(inside, **{kind: width})])


def test_model_is_its_blocks_and_the_rest():
    table = table_by_hand()
    b = [BlockWidths(4, 2, 3, 5, 7), BlockWidths(4, 8, 8, 2, 2)]
    rows = np.array([[getattr(x, k) for k in KINDS] for x in b])
    expected = sum(table.block_ms(r[None])[0] for r in rows) + table.rest_ms(np.array([4]))[0]
    assert table.model_ms(b) == pytest.approx(expected)
    assert table.ratio(table.dense) == 1


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
    monkeypatch.setattr(latency, "_measure_grids", lambda *_: pytest.fail("measured again"))
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
    raw = json.loads(text)
    wrong_shape = raw | {"grids": raw["grids"] | {"mlp": raw["grids"]["mlp"] | {"values": [1.0, 2.0]}}}
    no_rest = raw | {"grids": {k: v for k, v in raw["grids"].items() if k != "rest"}}
    falling = raw | {"grids": raw["grids"] | {"rest": {"axes": {"emb": [48, 16]}, "values": [1.0, 2.0]}}}
    damaged = [text[:100].encode(), b"\xff\xfe\x00", b"{}", b"[]", b"3"]
    damaged += [json.dumps(x).encode() for x in (wrong_shape, no_rest, falling)]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a latency table") as e:
            LatencyTable.load(file)
        assert "\n" not in str(e.value), content


def test_a_table_file_with_a_value_that_is_no_time_is_refused(tmp_path):
    raw = json.loads(LatencyTable.analytic(make("plain"), SMALL_BUNDLES).to_json())
    raw["grids"]["rest"]["values"][0] = float("nan")
    (tmp_path / "t.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "t.json")


def test_unsupported_models_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"Linear is not supported.*Supported families"):
        LatencyTable.analytic(torch.nn.Linear(2, 2))
    assert adapters.FAMILIES


def test_analytic_counts_the_three_matrices_of_a_gated_mlp():
    model, _ = prepared("swiglu_packed")
    assert LatencyTable.analytic(model).dense_ms == pytest.approx(macs(model, (3, 16, 16)) / 1e9, rel=1e-9)
