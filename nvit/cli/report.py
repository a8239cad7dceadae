"""`nvit report`: one HTML page of what runs cost and gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report.page import report
from ..report.suggestion import suggest
from ..utils.progress import Progress
from ..utils.report import write_result
from ..utils.stages import Stage
from .command import flat
from .flags.prune import PruneCommand
from .flags.report import ReportCommand
from .progress import shown


def run_report(command: ReportCommand, progress: Progress) -> dict[str, Any]:
    """What goes into the JSON beside the page."""
    folders = command.models
    out = Path(command.out or Path(folders[0]) / "report.html")
    runs = report(folders, out, flat(PruneCommand()), progress)
    found = [(folder, run, suggest(run)) for folder, run in zip(folders, runs, strict=True)]
    rows = [
        {
            "run": folder,
            "kind": run.kind,
            "suggested": None if said.model is None else said.model.name,
            "target": None if said.model is None else said.model.target,
            "knee": None if said.knee is None else said.knee.target,
            "in_words": f"{said.headline} {said.why}",
            "absent": list(run.absent),
        }
        for folder, run, said in found
    ]
    result = {"page": str(out), "runs": rows}
    write_result(out.parent, result, f"{out.name}.json")  # a run's folder has a result.json of its own
    return result


def run(command: ReportCommand) -> None:
    with shown([Stage("reading", 1), Stage("drawing", 3)]) as progress:
        found = run_report(command, progress)
    print(f"{found['page']}: {found['runs'][0]['in_words']}")
