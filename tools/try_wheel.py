"""Build one wheel and try it on several torch releases, each in an environment of its own.

    python tools/try_wheel.py --torch 2.11.0 --torch 2.15.0 --python python3.10 --python python3.12

Torches and Pythons are paired in order, the last Python serving the rest. An environment that exists already can be
given instead of a release: --use /path/to/python. Prints one line for each; exits 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

TRIAL = """
import platform, warnings
warnings.simplefilter("error", UserWarning)  # the plain-torch path would warn
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert
import nvit_kernels
from nvit_kernels import _native, sparse24
from nvit_kernels.sparse24.permute import search_channel_order

native = _native.load()
assert "site-packages" in nvit_kernels.__file__ or "wheel" in nvit_kernels.__file__, nvit_kernels.__file__
assert native.cpu, native.why_not_cpu
checked = 0
for source in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
    for to in (None, torch.float16, torch.bfloat16) if source == torch.float32 else (None,):
        for shape in ((32, 128), (96, 1152), (768, 3072)):
            x = (torch.randn(shape) * 30).to(source)
            packed = sparse24.compress_2to4(x, dtype=to)
            places = sparse24.unpack_bits(packed.bitmask)
            pruned = torch.where(places, x, torch.zeros((), dtype=source)).to(to or source)
            values, meta = convert(pruned)
            assert torch.equal(packed.values, values) and torch.equal(packed.meta, meta)
            assert torch.equal(sparse24.decompress_2to4(packed.values, packed.meta), pruned)
            assert torch.equal(sparse24.repack_2to4(x, packed.meta, dtype=to), values)
            tiles = torch.ops.nvit._compress_2to4_tiles([x], [], to, True)
            assert all(torch.equal(a[0], b) for a, b in zip(tiles, packed))
            checked += 1
x = torch.randn(32, 128).half()
torch.library.opcheck(torch.ops.nvit.compress_2to4.default, ([x], [], None, True))
compiled = torch.compile(lambda x: sparse24.compress_2to4(x), fullgraph=True)(x)
assert all(torch.equal(a, b) for a, b in zip(compiled, sparse24.compress_2to4(x)))
try:
    sparse24.compress_2to4(x * float("nan"))
    raise AssertionError("NaN was accepted")
except ValueError as refusal:
    assert str(refusal).startswith("compress_2to4: matrix 0 holds NaN"), refusal
found = search_channel_order(torch.randn(48, 64), rounds=20)
assert found.kept_after > found.kept_before
cuda = "loaded" if native.cuda else f"not loaded ({native.why_not_cuda})"
print(f"torch {torch.__version__}, Python {platform.python_version()}: {checked} conversions equal torch's bytes, "
      f"opcheck, fullgraph compile and refusals pass; CUDA half {cuda}")
"""


def run(*command: str | Path) -> None:
    # Away from the repository, so that nothing but the wheel can be imported.
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, python: str, torch: str) -> Path:
    run(python, "-m", "venv", folder)
    run(folder / "bin/pip", "install", "--quiet", f"torch=={torch}", "numpy")
    return folder / "bin/python"


def trial(python: Path, wheel: Path, folder: Path) -> str:
    """Install the wheel beside, not into, the environment: `--use` environments stay as they are."""
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "wheel", wheel)
    env = {**os.environ, "PYTHONPATH": str(folder / "wheel")}
    done = subprocess.run([python, "-c", TRIAL], capture_output=True, text=True, env=env, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", default=[], help="a release to try; repeat for several")
    parser.add_argument("--python", action="append", default=[], help="interpreter for it (default: this one)")
    parser.add_argument("--use", action="append", default=[], type=Path, help="a Python that has a torch already")
    options = parser.parse_args()
    if not options.torch and not options.use:
        parser.error("name a release with --torch or an interpreter with --use")
    pythons = options.python or [sys.executable]
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch) / "dist")
        print(f"{wheel.name}, {wheel.stat().st_size / 1024:.0f} KiB", flush=True)
        wanted = [("use", str(p), None) for p in options.use]
        wanted += [("torch", t, pythons[min(i, len(pythons) - 1)]) for i, t in enumerate(options.torch)]
        for i, (kind, name, interpreter) in enumerate(wanted):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    use = Path(name) if kind == "use" else make_environment(Path(folder) / str(i), interpreter, name)
                    print(trial(use, wheel, Path(folder)), flush=True)
                except RuntimeError as error:
                    failed = True
                    print(f"{name}: FAILED: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
