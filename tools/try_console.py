"""Build a wheel with `python -m build` on several Pythons and try its console script, each in a fresh environment.

    python tools/try_console.py --python python3.10 --python python3.13   # --full: with all it needs

The build is isolated, so it sees no torch: the wheel is pure Python and has to be the same everywhere (`py3-none-any`).
Without --full only what help needs is installed beside it, and the help of every command is asked for; with it, the
bundled model is evaluated too. Prints a line for each Python; exits 1 if any failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LIGHT = ("tyro>=1.0", "rich>=13", "tomli>=2; python_version < '3.11'")


def run(*command: str | Path) -> str:
    # Away from the repository, so that nothing but the wheel can be imported.
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


def trial(python: str, folder: Path, full: bool) -> str:
    run(python, "-m", "venv", folder / "build")
    run(folder / "build/bin/pip", "install", "--quiet", "build")
    run(folder / "build/bin/python", "-m", "build", "--wheel", "--outdir", folder, REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    if not wheel.name.endswith("-py3-none-any.whl"):
        raise RuntimeError(f"{wheel.name} is not pure Python")
    run(python, "-m", "venv", folder / "use")
    bin = folder / "use/bin"
    if full:
        run(bin / "pip", "install", "--quiet", wheel)
    else:
        run(bin / "pip", "install", "--quiet", *LIGHT)
        run(bin / "pip", "install", "--quiet", "--no-deps", wheel)
    version = run(bin / "nvit", "--version").split()[-1]
    commands = re.findall(r"^  nvit ([a-z]+(?: [a-z]+)?)", run(bin / "nvit", "--help"), re.M)
    if "prune" not in commands:
        raise RuntimeError("nvit --help does not list prune")
    for command in commands:
        run(bin / "nvit", *command.split(), "--help")
    done = f"nvit {version}, {wheel.name} of {wheel.stat().st_size / 1024:.0f} KiB, help of {len(commands)} commands"
    if full:
        run(bin / "nvit", "evaluate", "digits", "--data", "digits", "--device", "cpu", "--out", folder / "evaluated")
        done += ", nvit evaluate digits"
    return f"{run(python, '--version').strip()}: {done}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="interpreter; repeat for several (this one)")
    parser.add_argument("--full", action="store_true", help="install everything the wheel depends on")
    options = parser.parse_args()
    failed = False
    for python in options.python or [sys.executable]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(trial(python, Path(folder), options.full), flush=True)
            except RuntimeError as error:
                failed = True
                print(f"{python}: FAILED: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
