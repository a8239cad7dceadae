"""The folder of a run: the only place that knows the names in it, and how long each file stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import parallel
from ..latency.table import LatencyTable
from ..structure import snapshot
from ..utils.report import RESULT, write_csv, write_result
from .pruner import Pruner
from .result import Pruned


class RunFolder:
    """Where a run keeps its files. Without a path nothing is written and there is nothing to go on from. Of several
    ranks the first writes, the others wait.

    | name | holds | stays |
    |---|---|---|
    | `target-<t>/` | the snapshot at target t | yes |
    | `latency_table.json` | the table that decides | yes |
    | `history.csv` | a row per decision | yes |
    | `result.json` | what was found; with it the run is finished | yes |
    | `run_state.safetensors` | enough to go on pruning | until the run is finished |
    | `finetune_state_<t>.safetensors` | enough to go on finetuning the snapshot at t | until the run is finished |

    Attributes:
        resume: go on from what an interrupted run left here.
    """

    def __init__(self, path: str | Path | None = None, resume: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.resume = resume

    def _file(self, name: str) -> Path | None:
        return None if self.path is None else self.path / name

    @property
    def state_file(self) -> Path | None:
        return self._file("run_state.safetensors")

    def finetune_state(self, target: float) -> Path | None:
        return self._file(f"finetune_state_{target:g}.safetensors")

    def snapshot(self, target: float) -> Path | None:
        return self._file(f"target-{target:g}")

    def snapshots(self) -> dict[float, Path]:
        """The snapshots that are there, by target."""
        if self.path is None or not self.path.is_dir():
            return {}
        found = {folder.name.removeprefix("target-"): folder for folder in self.path.glob("target-*")}
        return {float(t): f for t, f in sorted(found.items()) if _is_number(t) and snapshot.is_snapshot(f)}

    def begin(self) -> None:
        """Raise ValueError where a finished run would be overwritten."""
        file = self._file(RESULT)
        if parallel.from_main(lambda: not self.resume and file is not None and file.exists()):
            raise ValueError(f"{self.path} holds a finished run; choose another --out or remove it")

    def table(self, make: Callable[[], LatencyTable]) -> LatencyTable:
        """The table of the run, the same on every rank: the one an interrupted run began with, else what `make` gives
        on rank 0, kept from then on."""
        file = self._file("latency_table.json")

        def kept() -> LatencyTable:
            if self.resume and file is not None and file.exists():
                return LatencyTable.load(file)
            table = make()
            if file is not None:
                table.save(file)
            return table

        return parallel.from_main(kept)

    def resumable(self) -> bool:
        """Whether there is a run state to go on from."""
        file = self.state_file
        return parallel.from_main(lambda: self.resume and file is not None and file.exists())

    def take(self, pruner: Pruner, target: float, model: nn.Module) -> Pruned:
        """The compact model that meets `target`, written as soon as it is there."""
        pruned = Pruned(target, model, pruner.ratio, reading=pruner.readings.get(target))
        self.save(pruned)
        return pruned

    def save(self, pruned: Pruned) -> None:
        """Write a snapshot, over an older one of the same target."""
        if self.path is not None:
            parallel.from_main(lambda: pruned.save(self.snapshot(pruned.target)))

    def again(self, pruner: Pruner, device: torch.device) -> list[Pruned]:
        """Snapshots of targets met before the interruption."""
        found = []
        for target in pruner.met:
            folder = self.snapshot(target)
            metrics = snapshot.load_metrics(folder)
            ratio = metrics.pop("predicted_ratio")
            for name in ("target", "met", "judged_by", "measured_ratio", "measured_spread"):
                metrics.pop(name, None)
            model = snapshot.load(folder, device, sparse=False)
            found.append(Pruned(target, model, ratio, metrics, pruner.readings.get(target)))
        return found

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.path is not None:
            parallel.from_main(lambda: write_csv(self.path / "history.csv", rows))

    def states(self) -> list[Path]:
        """The files from which an interrupted run goes on, of those that are there."""
        if self.path is None:
            return []
        every = (self.state_file, *sorted(self.path.glob("finetune_state_*.safetensors")))
        return [file for file in every if file.exists()]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, and remove the states, which nobody will need again; on rank 0 alone."""
        if self.path is None:
            return
        write_result(self.path, result)
        for state in self.states():
            state.unlink()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
