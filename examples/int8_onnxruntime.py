"""int8 in onnxruntime: its own quantisation of a file that `nvit export` wrote; pip install 'nvit[export]'.

Weights become int8, activations are quantised as they come, so that no images are needed. Whether it is faster depends
on the processor and the widths; here both files are timed, and both answer the same digits.
"""

import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic

import nvit
from nvit.data import Digits
from nvit.export.export import export

model = nvit.load(nvit.BUNDLED)  # or any snapshot; `nvit export SNAPSHOT --format onnx --out served` writes the same
export(model, "served", ["onnx"])
quantize_dynamic("served/model.onnx", "served/model.int8.onnx", weight_type=QuantType.QInt8, per_channel=True)

images, labels = zip(*Digits(training=False), strict=True)
images, labels = np.stack(images), np.array(labels)
for path in (Path("served/model.onnx"), Path("served/model.int8.onnx")):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    [logits] = session.run(None, {"images": images})
    ms = 1e3 * (time.perf_counter() - start) / len(images)
    top1 = (logits.argmax(-1) == labels).mean()
    print(f"{path.name}: top-1 {100 * top1:.2f} %, {path.stat().st_size / 1e6:.2f} MB, {ms:.3f} ms an image")
