"""The files from which an interrupted run goes on, without torch: who is interrupted while that is imported is answered
as well."""

from __future__ import annotations

from pathlib import Path

RUN_STATE = "run_state.safetensors"
"""Enough to go on pruning."""


def finetune_state(target: float) -> str:
    """Enough to go on finetuning the snapshot at a target."""
    return f"finetune_state_{target:g}.safetensors"


def states_in(folder: Path) -> list[Path]:
    """Those that are there."""
    every = (folder / RUN_STATE, *sorted(folder.glob("finetune_state_*.safetensors")))
    return [file for file in every if file.exists()]
