"""What a run without training leaves after each target, so that an interrupted one goes on with the next."""

from __future__ import annotations

import torch

from .. import parallel
from ..structure.run_state import load_run_state, save_run_state
from ..training.recipe import recipe_of, refuse_other
from .folder import RunFolder
from .pruner import Pruner
from .result import Pruned


def keep(pruner: Pruner, folder: RunFolder) -> None:
    """Write weights, masks and history as they are after a decision."""
    if folder.state_file is None:
        return
    values, tensors = pruner.state()
    every = parallel.to_main({f"model.{n}": p for n, p in pruner.params.items()} | tensors)
    values |= {"recipe": recipe_of(pruner.config)}
    parallel.from_main(lambda: save_run_state(folder.state_file, every, values))


def go_on(pruner: Pruner, folder: RunFolder) -> list[Pruned]:
    """Restore what `keep` wrote last; returns the snapshots of the targets met by then, none where there is no state.

    Raises:
        ValueError: the state is damaged, or of a run with another recipe.
    """
    if not folder.resumable():
        return []
    tensors, values = load_run_state(folder.state_file)
    if "recipe" not in values:
        raise ValueError(f"{folder.state_file} is of a run that trains; resume with the same recipe, or start anew")
    refuse_other(folder.state_file, values["recipe"], pruner.config)
    with torch.no_grad():
        for name, p in pruner.params.items():
            p.copy_(parallel.like(tensors[f"model.{name}"], p))
    pruner.restore(values, tensors)
    return folder.again(pruner, next(pruner.model.parameters()).device)
