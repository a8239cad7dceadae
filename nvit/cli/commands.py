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
    prediction,
    prune,
    report,
    rule,
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
    "analyze latency": prediction.COMMAND,
    "analyze rule": rule.COMMAND,
    "analyze sensitivity": sensitivity.COMMAND,
}
