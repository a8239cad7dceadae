"""The stopwatch: modes and dtypes as deployed, functions made ready once, time kept to what was asked."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nvit.latency import clock, measure
from nvit.latency import table as table_module
from nvit.latency.clock import Stopwatch, as_deployed, current_setting, in_dtype, time_models
from nvit.latency.table import LatencyTable
from nvit.utils import modes
from tests.hosts import images, make

SMALL_BUNDLES = {"emb": 16, "heads": 1, "qk_dim": 8, "v_dim": 8, "mlp": 16}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeGraphs:
    """Stands in for CUDA graphs on a CPU: a function is captured after two runs, and replays count."""

    def __init__(self) -> None:
        self.captured, self.replays, self.memories = 0, 0, []

    def __call__(self, function, inputs, memory=None):
        function(*inputs)
        function(*inputs)
        self.captured += 1
        self.memories.append(memory)

        def replay():
            self.replays += 1
            function(*inputs)

        return replay


@pytest.fixture
def graphs(monkeypatch):
    fake = FakeGraphs()
    monkeypatch.setitem(modes.RUNNERS, "graph", fake)
    return fake


def test_what_is_deployed_where():
    assert as_deployed("cpu") == ("eager", torch.float32)
    assert as_deployed("cuda") == as_deployed(torch.device("cuda:1")) == ("graph", torch.bfloat16)
    assert as_deployed("cuda", "eager", "float16") == ("eager", torch.float16)
    assert as_deployed("cpu", "compile", torch.bfloat16) == ("compile", torch.bfloat16)


def test_graphs_are_refused_on_a_cpu_and_unknown_modes_anywhere():
    with pytest.raises(
        ValueError, match=r"latency mode graph needs a CUDA GPU, and this is a CPU; take eager or compile"
    ):
        as_deployed("cpu", "graph")
    with pytest.raises(ValueError, match="latency mode 'graf' is unknown; expected one of eager, graph, compile"):
        as_deployed("cuda", "graf")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        LatencyTable.measure(make("plain"), 2, mode="graph", seconds=0.1)


def test_a_function_is_captured_once_and_replayed_in_every_round(graphs):
    watch = Stopwatch("cpu", "graph")
    x = torch.randn(4)
    for function in (torch.sin, torch.cos):
        watch.add(function, x)
    assert graphs.captured == 2 and graphs.replays == 2, "each runs once when it is added"
    times = [watch.round(), watch.round()]
    assert graphs.captured == 2 and graphs.replays == 6
    assert all(ms >= 0 for row in times for ms in row) and len(watch.first) == 2
    assert len(watch.medians(0.0)) == 2 and graphs.replays == 8, "one round at least, though the time is over"


def test_models_are_timed_as_graphs_and_keep_their_mode(graphs):
    pair = [make("plain").train(), make("three_blocks")]
    times = time_models(pair, images(pair[0], 2), 0.01, "graph")
    assert len(times) == 2 and graphs.captured == 2
    assert [m.training for m in pair] == [True, False]


def test_a_model_is_copied_into_another_dtype_alone():
    model = make("plain")
    assert in_dtype(model, torch.float32) is model
    half = in_dtype(model, torch.bfloat16)
    assert half is not model and next(half.parameters()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32


def test_a_table_says_its_mode_and_dtype_and_is_of_replays_alone(graphs, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "LEVELS", dict.fromkeys(measure.LEVELS, 2))
    monkeypatch.setattr(table_module, "as_deployed", lambda *_: ("graph", torch.bfloat16))
    found = LatencyTable.measure(make("plain"), 2, bundle_sizes=SMALL_BUNDLES, seconds=0.05)
    assert (found.setting.mode, found.setting.dtype) == ("graph", "bfloat16")
    assert graphs.captured == 1 + 2**4 + 2**2 + 2, "the dense model and every sample"
    found.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json").setting == found.setting


def test_a_table_of_another_mode_is_refused():
    table = LatencyTable.analytic(make("plain"), SMALL_BUNDLES)
    table.setting = replace(current_setting("cpu", torch.float32, 2, 5), mode="graph")
    with pytest.raises(ValueError, match="latency table was measured with mode graph, this run has eager"):
        table.check(replace(table.setting, mode="eager"), table.dense)


def test_a_table_file_from_before_modes_is_eager(tmp_path):
    table = LatencyTable.analytic(make("plain"), SMALL_BUNDLES)
    table.setting = current_setting("cpu", torch.float32, 2, 5)
    raw = json.loads(table.to_json())
    assert raw["setting"].pop("mode") == "eager"
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert LatencyTable.load(tmp_path / "old.json").setting == table.setting


# --- within the seconds asked -----------------------------------------------------------------------------------------


def simulated(monkeypatch, first: float, steady: float) -> SimpleNamespace:
    """A stopwatch on a clock of its own: adding a function takes `first` seconds, running it `steady` ones."""
    now = SimpleNamespace(s=0.0, added=0, rounds=0)

    class Simulated(Stopwatch):
        def add(self, function, *inputs):
            now.s += first
            now.added += 1
            self.first.append(first)

        def round(self):
            now.s += steady * now.added
            now.rounds += 1
            return [1.0] * now.added

    for module in (measure, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.s))
    monkeypatch.setattr(measure, "Stopwatch", Simulated)
    return now


@pytest.mark.parametrize(
    ("seconds", "samples"),
    [(1000, 108 + 20 + 4), (15, 48 + 20 + 4), (7, 24 + 9 + 3), (4, 16 + 4 + 2), (0.1, 16 + 4 + 2)],
)
def test_the_grid_gets_coarser_where_first_calls_leave_no_time_for_all_of_it(seconds, samples, monkeypatch):
    """At 0.15 s a first call, as on a GPU where each shape is tuned: the whole grid would take 20 s."""
    now = simulated(monkeypatch, first=0.15, steady=0.001)
    model = make("plain", embed_dim=96, mlp_ratio=4.0)
    table = LatencyTable.measure(model, 2, bundle_sizes=SMALL_BUNDLES, seconds=seconds)
    assert now.added == 1 + samples
    least = 0.15 * (1 + 16 + 4 + 2) + 4 * 0.001 * 23
    assert now.s <= max(seconds, least) + 0.2, "more time was taken than asked"
    assert sum(g.values.size for g in table.grids.values()) == samples
    assert table.dense_ms == pytest.approx(1.0)


def test_a_coarse_table_is_used_again_by_whoever_has_no_more_time(monkeypatch, tmp_path):
    now = simulated(monkeypatch, first=0.15, steady=0.001)

    def added(seconds: float) -> int:
        before = now.added
        model = make("plain", embed_dim=96, mlp_ratio=4.0)
        now.added = 0
        LatencyTable.measure(model, 2, bundle_sizes=SMALL_BUNDLES, seconds=seconds, cache=tmp_path)
        found, now.added = now.added, before
        return found

    assert [added(7), added(7), added(1000), added(7)] == [37, 1, 133, 1], "the dense model alone is timed again"


@pytest.mark.gpu
@cuda
def test_on_a_gpu_a_table_is_of_graphs_in_bfloat16_and_keeps_to_its_time():
    import time

    start = time.perf_counter()
    table = LatencyTable.measure(make("plain"), 8, "cuda", bundle_sizes=SMALL_BUNDLES, seconds=20)
    assert time.perf_counter() - start < 30
    assert (table.setting.mode, table.setting.dtype) == ("graph", "bfloat16") and table.dense_ms > 0


@pytest.mark.gpu
@cuda
def test_a_graph_is_no_slower_than_eager_calls():
    model = make("plain", depth=6).cuda()
    x = images(make("plain"), 8).cuda()
    (eager,) = time_models([model], x, 0.5)
    (graph,) = time_models([copy.deepcopy(model)], x, 0.5, "graph")
    assert graph <= 1.05 * eager
