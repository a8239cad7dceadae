"""Every command by its words."""

from .command import Command
from .flags import (
    attention,
    compare,
    correlation,
    evaluate,
    export,
    finetune,
    latency,
    prune,
    report,
    sensitivity,
    sparsify,
    widths,
)

COMMANDS: dict[str, Command] = {
    "demo": prune.DEMO,
    "prune": prune.COMMAND,
    "finetune": finetune.COMMAND,
    "evaluate": evaluate.COMMAND,
    "compare": compare.COMMAND,
    "latency": latency.COMMAND,
    "sparsify": sparsify.COMMAND,
    "export": export.COMMAND,
    "report": report.COMMAND,
    "analyze widths": widths.COMMAND,
    "analyze attention": attention.COMMAND,
    "analyze correlation": correlation.COMMAND,
    "analyze sensitivity": sensitivity.COMMAND,
}
