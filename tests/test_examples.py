"""The examples are run: the notebook in a kernel of its own, the callbacks' scripts with fewer epochs, int8 whole."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nvit

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "needs", "fewer", "folder"),
    [
        ("prune_with_lightning.py", "lightning", {"max_epochs=20": "max_epochs=4"}, "digits-lightning"),
        ("prune_with_transformers.py", "transformers", {"EPOCHS = 8": "EPOCHS = 0.5"}, "digits-transformers/pruned"),
    ],
)
def test_a_callbacks_example_prunes_to_its_targets(script, needs, fewer, folder, tmp_path):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed; the extra `test` has it")
    code = (EXAMPLES / script).read_text()
    for written, shorter in ({"interval=4": "interval=2"} | fewer).items():
        assert code.count(written) == 1, written
        code = code.replace(written, shorter)
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reached = [
        tuple(map(float, found)) for found in re.findall(r"^Pruned\((.*?): predicted ([\d.]+)", done.stdout, re.M)
    ]
    assert len(reached) == 2 and all(predicted <= target for target, predicted in reached)
    assert nvit.load(tmp_path / folder).training is False


@pytest.mark.long
def test_int8_is_smaller_and_answers_the_same_digits(tmp_path):
    for needs in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needs, reason=f"{needs} is not installed; the extra `test` has it")
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / "int8_onnxruntime.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^(\S+): top-1 ([\d.]+) %, ([\d.]+) MB", done.stdout, re.M)
    (full, exact, large), (int8, near, small) = ((name, float(top1), float(mb)) for name, top1, mb in found)
    assert (full, int8) == ("model.onnx", "model.int8.onnx") and small < 0.6 * large
    assert exact > 90 and near > exact - 1


def test_a_pruned_model_is_the_encoder_of_a_decoder_of_smp(tmp_path):
    pytest.importorskip("segmentation_models_pytorch", reason="the extra `test` has segmentation-models-pytorch")
    code = (EXAMPLES / "decode_with_smp.py").read_text()
    assert code.count("EPOCHS = 10, 10") == 1
    code = code.replace("EPOCHS = 10, 10", "EPOCHS = 10, 2") + "\nprint(type(model.encoder.model.blocks[0].attn))"
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"^mIoU ([\d.]+) %", done.stdout, re.M)[1]) > 10, "one class for all pixels has 5"
    assert "nvit.layers" in done.stdout, "it is ours, not one that timm made anew"


def test_the_notebook_runs_and_shows_a_table_and_a_picture(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; the extra `test` has it")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; the extra `test` has it")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; the extra `test` has it")
    notebook = nbformat.read(EXAMPLES / "prune.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "numbers of some machine are not kept in it"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    html = "".join(out["data"]["text/html"] for out in shown if "text/html" in out.get("data", {}))
    printed = "".join(out["text"] for out in shown if out["output_type"] == "stream" and out["name"] == "stdout")
    assert html.count("<svg") == 2 and "target 0.6" in html and "ms saved by a unit" in html
    assert any("image/png" in out.get("data", {}) for out in shown)
    assert float(re.search(r"finetuned: top-1 ([\d.]+)", printed)[1]) > 85
