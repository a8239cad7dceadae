"""Every command by its words."""

from .command import Command
from .flags import compare, correlation, evaluate, export, finetune, latency, prune, report, sparsify, widths

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
    "analyze correlation": correlation.COMMAND,
}
