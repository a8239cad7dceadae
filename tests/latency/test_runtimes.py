"""Latency where a model is served: pieces and models exported to another runtime and timed there."""

import json
import time
from dataclasses import replace

import pytest
import torch

from nvit import LatencyTable, adapters
from nvit.export import pieces
from nvit.export.pieces import ready, runtime_version
from nvit.latency import measure
from nvit.latency.clock import check_runtime, current_setting, time_rounds
from tests.hosts import make

pytestmark = pytest.mark.usefixtures("torchlib_once")

BUNDLES = {"emb": 16, "heads": 3, "qk_dim": 16, "v_dim": 16, "mlp": 32}
"""Of heads and their dims all leave together, so that few pieces are converted, which is what takes time here."""


@pytest.fixture(scope="module")
def calls():
    """Three functions of one model, in two conversions."""
    model = adapters.find(m := make("deit_distilled")).prepare(m)
    x = torch.randn(2, 6, 48)
    return [
        (model, model, torch.randn(2, 3, 16, 16)),
        (model.blocks[0], model.blocks[0].mlp, x),
        (model.blocks[1], model.blocks[1], x),
    ]


@pytest.mark.parametrize("runtime", pieces.RUNTIMES)
def test_pieces_compute_the_same_in_the_callers_thread(calls, runtime, monkeypatch):
    if runtime == "openvino":
        calls = calls[1:]  # the same conversion, so one is enough
    monkeypatch.setattr(pieces, "TOGETHER", 2)
    with torch.inference_mode():  # as measurements are
        runs = ready(calls, runtime, threads=1)
        expected = [function(x) for _, function, x in calls]
    own, whole = time.thread_time(), time.process_time()
    for _ in range(200):
        found = [run() for run in runs]
    own, whole = time.thread_time() - own, time.process_time() - whole
    assert own > 0.8 * whole, "the clock reads the caller's thread where there is one"
    for out, want in zip(found, expected, strict=True):
        array = torch.from_numpy(out.numpy() if runtime == "onnxruntime" else out.data.copy())
        torch.testing.assert_close(array, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_a_table_of_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LEVELS", dict.fromkeys(measure.LEVELS, 2))
    model = make("plain", mlp_ratio=40.0)  # so wide that what 32 of them take less is seen in a tenth of a second
    how = {"bundle_sizes": BUNDLES, "seconds": 0.1, "cache": tmp_path}
    table = LatencyTable.measure(model, 8, runtime="onnxruntime", **how)
    assert table.setting.runtime == "onnxruntime" and table.setting.versions == runtime_version("onnxruntime")
    assert 0 < table.ratio([replace(b, mlp=32) for b in table.dense]) < 1
    assert "onnxruntime" in repr(table)
    with pytest.raises(ValueError, match="measured with runtime onnxruntime, this run has torch"):
        table.check(current_setting("cpu", torch.float32, 8, 5), table.dense)
    assert len(list(tmp_path.iterdir())) == 1
    raw = json.loads(table.to_json())
    del raw["setting"]["runtime"]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert LatencyTable.load(tmp_path / "old.json").setting.runtime == "torch", "tables from before are torch's"
    rounds = time_rounds([model], torch.randn(2, 3, 16, 16), 0.1, "eager", "onnxruntime")
    assert rounds.shape[1] == 1 and (rounds > 0).all()


def test_what_cannot_be_timed_so_is_one_line(monkeypatch):
    for device, mode, dtype in (("cuda", "eager", torch.float32), ("cpu", "compile", torch.float32)):
        with pytest.raises(ValueError, match="runtime openvino is timed on the CPU in float32"):
            check_runtime("openvino", device, mode, dtype)
    with pytest.raises(ValueError, match="runtime 'ort' is unknown; expected one of torch, onnxruntime"):
        runtime_version("ort")
    monkeypatch.setattr("nvit.export.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'nvit\[export\]'"):
        runtime_version("openvino")
