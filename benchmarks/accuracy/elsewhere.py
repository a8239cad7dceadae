"""Share of the dense model's top-1 that models with merged tokens and pruned widths keep on images of another kind.

    NVIT_DATA=FOLDER python -m benchmarks.accuracy.elsewhere --work FOLDER [--targets 0.5]

Models of `benchmarks.accuracy.tokens` in --work, calibrated and chosen on imagenet_sample1000, answer Tiny-ImageNet's
validation images, which nothing was tuned on: 64 pixels made 224, every fifth of the 10,000, the best of its 200
classes counts. `kept` is in percent of the dense model's top-1 there, with its 95 % interval (paired bootstrap over
images). Rows go into elsewhere_cpu.csv in benchmarks/results; answers stay in --work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nvit
from benchmarks.accuracy.library import data_folder
from benchmarks.accuracy.paired import ratio_bootstrap
from benchmarks.accuracy.rows import Resumed
from benchmarks.accuracy.token_bench import MODELS, TokenBench
from benchmarks.accuracy.upscaled import Tiny
from nvit.analysis.evaluate import macs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks.accuracy.tokens")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--of", default="macs", choices=("macs", "latency"))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5])
    parser.add_argument("--methods", nargs="+", default=["joint", "ToMe"])
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    args = parser.parse_args()
    records, tiny = Resumed("elsewhere", ("model", "of", "target", "method")), Tiny(data_folder())
    for name in args.models:
        bench = TokenBench(name, args.of, args.images, args.work)
        whole = macs(bench.plain, nvit.adapters.preprocess(bench.plain)["input_size"])
        dense = bench.kept("tiny-dense", lambda bench=bench: tiny.right(bench.plain))
        for target in args.targets:
            for method in args.methods:
                if not (path := bench.folder(method, target)).exists():
                    sys.exit(
                        f"{path} does not exist; run benchmarks.accuracy.tokens {args.of} --work {args.work} first"
                    )
                model = nvit.load(path)
                right = bench.kept(f"tiny-{method}-{target:g}", lambda model=model: tiny.right(model))
                share, low, high = (100 * v for v in ratio_bootstrap(right.tolist(), dense.tolist()))
                row = {"model": name, "of": args.of, "target": target, "method": method}
                row |= {"macs": macs(model, nvit.adapters.preprocess(model)["input_size"]) / whole}
                row |= {"top1": 100 * float(right.mean()), "dense": 100 * float(dense.mean())}
                records.add(**row, kept=share, low=low, high=high, images=len(right), calibration=args.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
