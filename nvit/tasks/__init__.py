"""What a model is for: what a batch holds, the loss, the metric. One file a task; nobody else knows a softmax.

To add one, write a subclass of `base.Task` in a file of its own and list it in `registry`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registry import TASKS

if TYPE_CHECKING:
    from .base import Meter, Task
    from .choice import infer, of, settled

__all__ = ["TASKS", "Meter", "Task", "infer", "of", "settled"]

_HOMES = {"Meter": "base", "Task": "base", "infer": "choice", "of": "choice", "settled": "choice"}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What `__all__` names, imported when it is first asked for: the names of tasks are flags, and come without
        torch."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
