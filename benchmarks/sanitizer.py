"""A few of the GPU tests under compute-sanitizer: reads and writes out of bounds, then races.

    python -m benchmarks.sanitizer [--seconds 40]

Small shapes of each kernel, since a kernel runs ten to a hundred times slower there. Ends with 77 and a reason where
the tool is missing or refuses the device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = 77
TOOLS = ("memcheck", "racecheck")
FILE = "tests/nvit_kernels/test_gpu.py"
CHOICE = "bfloat16 or dtype2"
SMALL = "(test_attention and 24-56) or (test_kept_layer_norm and 24) or test_group_dot or (test_mlps and 1-8-24)"
REFUSALS = ("Device not supported", "not supported on this", "Failed to initialize", "InitializationError")


def tool() -> str | None:
    """compute-sanitizer on the path, or in a toolkit that lies where toolkits lie."""
    places = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or next(
        (found for p in places if p and (found := shutil.which(f"{p}/bin/compute-sanitizer"))), None
    )


def verdict(code: int | None, output: str) -> tuple[int, str]:
    """Exit status and a line for what the tool said; `code` is None where its time was over."""
    if refusal := next((line for line in output.splitlines() if any(r in line for r in REFUSALS)), None):
        return SKIPPED, f"compute-sanitizer refuses: {refusal.strip(' =')}"
    if code is None:
        return SKIPPED, "time was over before the tests were through; nothing was found until then"
    summary = [line.strip(" =") for line in output.splitlines() if "SUMMARY" in line or " passed" in line]
    return int(code != 0), ", ".join(summary[-2:]) or f"exit {code}"


def run(binary: str, name: str, seconds: float) -> tuple[int, str]:
    """The small choice of tests under one tool."""
    tests = ["-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", FILE, "-k", f"({CHOICE}) and ({SMALL})"]
    words = [binary, "--tool", name, "--error-exitcode", "3", sys.executable, "-m", "pytest", *tests]
    # Every tensor a block of its own, so that a read past its end is one past the block's.
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | own, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # the tool and the process under it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        output = said.read()
    print(output, flush=True)
    return verdict(code, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="for all tools")
    end = time.monotonic() + parser.parse_args().seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs under the tool is ended as well
    binary = tool()
    if binary is None:
        print("compute-sanitizer is not installed")
        return SKIPPED
    found = {}
    for i, name in enumerate(TOOLS):
        found[name] = run(binary, name, (end - time.monotonic()) / (len(TOOLS) - i))
    print("; ".join(f"{name}: {line}" for name, (_, line) in found.items()))
    codes = {code for code, _ in found.values()}
    return 1 if codes - {0, SKIPPED} else SKIPPED if codes == {SKIPPED} else 0


if __name__ == "__main__":
    sys.exit(main())
