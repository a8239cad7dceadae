"""Numbers of a run as it goes, for curves: a callback, and where it writes to."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically

Log = Callable[[str, int, Mapping[str, float]], None]
"""Called as `log(stage, step, values)` where a run looks at its numbers anyway. Of a resumed run, a stage's first step
is the one after which it goes on; what was written of later ones never counted."""

KINDS = ("none", "csv", "tensorboard", "trackio")

COLUMNS = (
    "stage", "step", "loss", "ratio", "lr", "images_per_s",
    "emb", "heads", "qk_dim", "v_dim", "mlp", "refit_error",
)  # fmt: skip
"""Of a CSV: what any stage says. Ratios are of the dense latency by the table, widths means over blocks."""


def unlogged(stage: str, step: int, values: Mapping[str, float]) -> None:
    """Write nothing."""


class Rate:
    """Images per second between two looks."""

    def __init__(self) -> None:
        self.images, self._since = 0, time.monotonic()

    def read(self) -> float:
        """Of those counted since the last call."""
        now = time.monotonic()
        found = self.images / max(now - self._since, 1e-9)
        self.images, self._since = 0, now
        return found


@contextlib.contextmanager
def opened(kind: str, folder: Path | str, *, resume: bool = False) -> Iterator[Log]:
    """A log of one of `KINDS`, in `folder` (trackio keeps its own, under the folder's name); of rank 0 alone.

    Args:
        resume: go on with what is there; else it is replaced.

    Raises:
        ModuleNotFoundError: what it writes with is not installed.
        ValueError: an unknown kind, or a trackio that would send the log elsewhere.
    """
    if kind not in KINDS:
        raise ValueError(f"log {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if kind == "none" or int(os.environ.get("RANK", 0)):
        yield unlogged
        return
    log = {"csv": _Csv, "tensorboard": _TensorBoard, "trackio": _Trackio}[kind](Path(folder), resume)
    try:
        yield log
    finally:
        log.close()


class _Csv:
    """`log.csv`: a row a call."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.file = folder / "log.csv"
        self.old = list(csv.DictReader(io.StringIO(self.file.read_text()))) if resume and self.file.exists() else []
        self.begun: set[str] = set()

    def __call__(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self.begun:
            self._begin(stage, step)
        with open(self.file, "a", newline="") as f:
            csv.DictWriter(f, COLUMNS, lineterminator="\n").writerow({"stage": stage, "step": step} | dict(values))

    def _begin(self, stage: str, step: int) -> None:
        """Leave out rows of this stage that the run now goes through again."""
        if self.begun:
            self.old = list(csv.DictReader(io.StringIO(self.file.read_text())))
        self.begun.add(stage)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in self.old if row["stage"] != stage or int(row["step"]) < step)
        write_atomically(self.file, text.getvalue().encode())

    def close(self) -> None:
        """Every row is on disk already."""


class _TensorBoard:
    """A folder of events for each stage."""

    def __init__(self, folder: Path, resume: bool) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise _missing("tensorboard") from None
        self.make, self.folder, self.resume = SummaryWriter, folder, resume
        self.writers: dict[str, Any] = {}

    def __call__(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self.writers:
            if not self.resume:
                for old in (self.folder / stage).glob("events.out.tfevents.*"):
                    old.unlink()
            again = {"purge_step": step} if self.resume else {}
            self.writers[stage] = self.make(str(self.folder / stage), flush_secs=10, **again)
        for name, value in values.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class _Trackio:
    """A run of project `nvit`, on this machine; a resumed run's steps after its last state stand there twice."""

    ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

    def __init__(self, folder: Path, resume: bool) -> None:
        try:
            import trackio
        except ModuleNotFoundError:
            raise _missing("trackio") from None
        if there := next((name for name in self.ELSEWHERE if os.environ.get(name)), None):
            raise ValueError(f"{there} is set, and --log trackio keeps a log on this machine alone; unset it")
        self.trackio = trackio
        name = "-".join(folder.resolve().parts[-3:]).strip("/")
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        trackio.init(project="nvit", name=name, resume="allow" if resume else "never", **quiet)

    def __call__(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.trackio.finish()


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"--log {package} needs {package}, which is not here; run `pip install 'nvit[log]'`")
