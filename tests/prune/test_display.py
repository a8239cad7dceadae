"""What a person sees of results, tables and configs: short, and in a notebook a table and a picture."""

import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import nvit
from nvit.latency.table import LatencyTable
from nvit.prune import display
from nvit.spec import BlockWidths
from tests.runs import arguments


@pytest.fixture(scope="module")
def result():
    model, loader, config, table = arguments(train=False, score_batches=1)
    found = nvit.prune(model, loader, config, table)
    found.snapshots[1].metrics |= {"measured_ratio": 0.51, "top1": 70.0}
    return found


def test_a_results_repr_is_a_line_of_what_was_found(result):
    said = repr(result)
    assert len(said) < 300 and "\n" not in said
    assert said.startswith("PruneResult(curvature, 2 decisions; 0.8: predicted 0.") and "measured 0.510" in said
    assert len(repr(result.snapshots)) < 300 and repr(result.snapshots[0]).startswith("Pruned(0.8: predicted 0.")


def test_a_configs_repr_makes_it_again_and_says_what_differs():
    config = nvit.PruneConfig(latency_target=(0.8,), train=False)
    assert repr(config) == "PruneConfig(latency_target=(0.8,), train=False)"
    assert eval(repr(config), {"PruneConfig": nvit.PruneConfig}) == config
    assert repr(nvit.FinetuneConfig()) == "FinetuneConfig()"
    assert "<td" in config._repr_html_() and config._repr_html_().index("latency_target") < config._repr_html_().index(
        "<details>"
    )


def test_a_tables_repr_says_what_it_is_for(tmp_path):
    model = nvit.load(nvit.BUNDLED)
    assert repr(LatencyTable.analytic(model)).startswith("LatencyTable(4 blocks, 0.003495 GMACs an image, counted")
    measured = LatencyTable.measure(model, 4, seconds=0.2)
    threads = torch.get_num_threads()
    assert "ms for 4 images; " in repr(measured) and f"float32, eager, 17 tokens, {threads} thread" in repr(measured)
    assert "ms saved by a unit" in measured._repr_html_() and "QK per head" in measured._repr_html_()


def test_a_notebook_shows_a_table_and_the_widths_of_each_target(result):
    page = result._repr_html_()
    assert "speed-up" not in page and "70.00" in page and page.count("<svg") == 2
    assert page.index("dense") < page.index("target 0.8") < page.index("target 0.5")
    assert ET.fromstring(f"<div>{page}</div>") is not None, "well-formed"


def test_the_picture_has_a_bar_a_block_as_tall_as_its_width():
    dense = [BlockWidths(64, 4, 16, 16, 256)] * 3
    left = [BlockWidths(48, 4, 8, 16, 64 * (i + 1)) for i in range(3)]
    root = ET.fromstring(display.picture("a < b", dense, left))
    bars = [r for r in root if r.tag.endswith("rect")]
    assert len(bars) == 5 * 2 * 3
    tall = [float(r.get("height")) for r in bars[-3:]]
    assert tall == pytest.approx([display.HEIGHT * f for f in (0.25, 0.5, 0.75)], abs=0.05)
    texts = [t.text for t in root if t.tag.endswith("text")]
    assert "EMB 64 → 48" in texts and "MLP 256 → 64–192" in texts


def test_a_frame_has_the_dense_model_and_a_row_a_target(result):
    pytest.importorskip("pandas")
    found = result.to_frame()
    assert found["target"].tolist() == [1.0, 0.8, 0.5] and found["predicted_ratio"].is_monotonic_decreasing
    assert found["params"].tolist()[1:] == [sum(p.numel() for p in s.model.parameters()) for s in result.snapshots]
    assert found["top1"].iloc[2] == 70.0


def test_without_pandas_one_line_says_what_to_install(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^to_frame needs pandas, which is not here; run `pip install pandas`$"
    ):
        result.to_frame()
