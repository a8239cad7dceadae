"""A pruning run that is killed again and again beside one that is not: `python -m tests.killed FOLDER SEED`.

Leaves `whole.safetensors` and `killed.safetensors` in the folder: weights, masks and snapshots of the run never killed
and of the one that was. Prints how often it was. Forked from one process that has imported everything."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import nvit
from tests.runs import arguments, weights

KILLS = 6
FRACTIONS = (0.04, 0.18)
"""Of the seconds of the run never killed, the moments at which the other is."""


def run(root: Path, name: str) -> None:
    """Prune from the start or from what lies on disk, to the end."""
    model, loader, config, table = arguments(bundles_per_step=1, interval=3)
    result = nvit.prune(model, loader, config, table, out=root / name, resume=True)
    tensors = {f"model.{n}": w for n, w in weights(model).items()}
    tensors |= {f"mask.{n}": m for n, m in result.masks.items()}
    for i, s in enumerate(result.snapshots):
        tensors |= {f"snapshot{i}.{n}": w for n, w in weights(s.model).items()}
    save_file(tensors, root / f"{name}.part")
    os.replace(root / f"{name}.part", root / f"{name}.safetensors")


def child(root: Path, name: str) -> int:
    """The run in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(root, name)
            code = 0
        finally:
            os._exit(code)
    return pid


def main(root: Path, seed: int) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    assert os.waitpid(child(root, "whole"), 0)[1] == 0
    seconds = time.monotonic() - start
    draw, kills = random.Random(seed), 0
    for _ in range(60):
        pid = child(root, "killed")
        if kills < KILLS:
            time.sleep(draw.uniform(*FRACTIONS) * seconds)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert status == 0
            break
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
