"""From flags to a latency table: counted, read, or measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import adapters
from ..about import environment
from ..latency.clock import current_setting
from ..latency.table import LatencyTable, default_cache
from ..structure import snapshot
from ..utils.progress import Progress, silent
from .flags import LatencyFlags


def open_table(
    model: nn.Module, flags: LatencyFlags, bundle_sizes: Mapping[str, int], progress: Progress = silent
) -> LatencyTable:
    """The latency table of a command: counted, read, or measured on the model's device.

    Raises:
        ValueError: a table of another model or setting, or a mode that the device has not.
    """
    device = next(model.parameters()).device
    mode, dtype = flags.deployed(device)
    if flags.table == "analytic":
        return LatencyTable.analytic(model, bundle_sizes)
    if flags.table:
        table = LatencyTable.load(flags.table)
        if table.setting is not None:
            tokens = adapters.find(model).tokens(model)
            here = current_setting(device, dtype, flags.latency_batch, tokens, mode, flags.runtime)
            table.check(here, snapshot.spec_of(model).blocks)
        return table
    progress(0, 1, f"measuring latency, about {flags.latency_seconds:.0f} s")
    table = LatencyTable.measure(
        model,
        flags.latency_batch,
        device,
        dtype,
        mode=mode,
        runtime=flags.runtime,
        bundle_sizes=bundle_sizes,
        seconds=flags.latency_seconds,
        cache=default_cache(),
    )
    progress(1, 1, "measuring latency")
    return table


def measured_on(flags: LatencyFlags, device: torch.device) -> dict[str, Any]:
    """What result.json says of how latency was measured."""
    mode, dtype = flags.deployed(device)
    name = str(dtype).removeprefix("torch.")
    return {
        "latency_batch": flags.latency_batch,
        "latency_mode": mode,
        "runtime": flags.runtime,
        "latency_dtype": name,
        "device": str(device),
        "environment": environment(device),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """The same as a table's title."""
    how = f"{found['latency_dtype']}, {found['latency_mode'] if found['runtime'] == 'torch' else found['runtime']}"
    return f"{found['latency_batch']} images a batch on {found['device']}, {how}"
