"""How the short-row kernels are laid out: pieces of keys, rows a tile, warps, by architecture. No launches here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from nvit_kernels.configs import SHARED_BYTES
from nvit_kernels.launch import power_of_two

LARGEST_TOKENS = 208
LARGEST_HEAD = 64
WIDEST_BACKWARD_BYTES = 106 << 10  # shared memory of 256 keys, 64/64 dims, 16 rows, without warp groups


@dataclass(frozen=True)
class Config:
    """How a kernel is laid out: query rows a tile, warps, tiles fetched ahead + 1, and whether δ is summed first."""

    rows: int
    warps: int
    stages: int
    delta_first: bool = False


INTERPRETED = Config(rows=256, warps=4, stages=1)  # time grows with the number of operations, so one tile


def key_pieces(tokens: int) -> tuple[int, int, int]:
    """At most three powers of two from 16 to 128 that hold `tokens` keys and waste least, largest first; 0 for none."""
    choices = (c for n in (1, 2, 3) for c in itertools.combinations((128, 64, 32, 16), n) if sum(c) >= tokens)
    return (*min(choices, key=lambda c: (sum(c), len(c))), 0, 0)[:3]


def _warp_groups(arch: int) -> bool:
    """Whether products are of 64 rows and a warp group: Hopper and the data-centre Blackwells."""
    return 90 <= arch < 120


def _shared_bytes(arch: int) -> int:
    return SHARED_BYTES.get(arch, min(SHARED_BYTES.values()))


def forward_config(arch: int, tokens: int) -> Config:
    """The forward's layout on compute capability `arch`, as 90, or 0 in the interpreter; warp groups have 64 rows.

    A small shared memory holds one program of 128 keys or more, so that one has eight warps, of 16 rows each as always.
    """
    if not arch:
        return INTERPRETED
    if tokens <= 64:
        return Config(rows=64, warps=4, stages=1)
    if tokens > 128 and _shared_bytes(arch) < WIDEST_BACKWARD_BYTES:
        return Config(rows=128, warps=8, stages=1)
    return Config(rows=64, warps=4, stages=2)


def backward_config(arch: int, tokens: int, qk: int, v: int) -> Config | None:
    """The backward's layout on compute capability `arch`, as 90; None where it is not offered.

    What is offered spills no register and fits in shared memory, which `cases` compiles and its test asserts.
    """
    if not arch:
        return INTERPRETED
    if tokens <= 64:
        return Config(rows=64, warps=4, stages=1)
    if _warp_groups(arch):
        return Config(rows=32, warps=8, stages=2)
    if tokens <= 128:
        return Config(rows=32, warps=8, stages=1)
    if qk > 32 and v > 32 and _shared_bytes(arch) < WIDEST_BACKWARD_BYTES:
        return None
    return Config(rows=16, warps=8, stages=1)


def padded(arch: int, rows: int, qk: int, v: int) -> tuple[int, int]:
    """Head dims as the backward holds them with tiles of `rows` queries.

    Below 64 rows ∂qᵀ is computed, with a row per qk dim, and warp-group products need 64 of them.
    """
    least = 64 if _warp_groups(arch) and rows < 64 else 32 if arch else 16
    return power_of_two(qk, least), power_of_two(v)


def backward_keys(arch: int, tokens: int) -> int:
    """Keys as the backward holds them, in one piece."""
    return power_of_two(tokens, 64 if arch else 16)


def architecture(device: torch.device) -> int:
    """Compute capability as 80 or 90; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
