"""Configs of kernels: few per architecture, those over its shared memory left out, one under the interpreter.

Chained products put all warps along rows, so 8 warps want 128 rows: on 64 they would compute every product twice.
"""

from __future__ import annotations

import triton

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # most per block


def _config(num_warps: int, num_stages: int, **blocks: int) -> triton.Config:
    return triton.Config({f"BLOCK_{k}": v for k, v in blocks.items()}, num_warps=num_warps, num_stages=num_stages)


ADDED = ("bias", "window")  # optional arguments of attention's kernels that take registers and shared memory
NARROW, WIDE, WIDEST = 64, 128, 256  # head dims up to this, after padding to a power of two
CONFIGS = {  # by the largest head dim they hold without spilling; 0 where there is no head
    "attention_forward": {
        NARROW: [_config(4, 2, M=64, N=32), _config(8, 3, M=128, N=64)],
        WIDE: [_config(4, 2, M=64, N=32), _config(8, 2, M=128, N=32)],
        WIDEST: [_config(8, 1, M=64, N=32)],
    },
    "attention_dkv": {
        NARROW: [_config(4, 1, M=32, N=64), _config(4, 2, M=32, N=64), _config(8, 2, M=32, N=128)],
        WIDE: [_config(8, 1, M=32, N=64), _config(8, 2, M=32, N=64)],
        WIDEST: [_config(8, 1, M=16, N=32)],
    },
    "attention_dq": {
        NARROW: [_config(4, 1, N=32), _config(4, 2, N=32)],
        WIDE: [_config(8, 1, N=32), _config(8, 2, N=32)],
        WIDEST: [_config(8, 1, N=16)],
    },
    "attention_dbias": {
        NARROW: [_config(4, 1, M=64, N=32), _config(4, 2, M=64, N=32)],
        WIDE: [_config(8, 1, M=64, N=32), _config(8, 2, M=64, N=32)],
        WIDEST: [_config(8, 1, M=32, N=16)],
    },
    "tokens_backward": {0: [_config(8, 3, N=64, K=32), _config(8, 3, N=64, K=64)]},
    "tokens": {0: [_config(4, 3, N=64, K=32), _config(8, 3, N=128, K=32), _config(8, 3, N=128, K=64)]},
    "weights": {
        0: [_config(4, 3, M=64, N=64, K=32), _config(8, 3, M=128, N=128, K=32), _config(8, 3, M=128, N=128, K=64)]
    },
}
WITH_ADDED = {  # in place of the above where a bias or a window mask takes registers too
    "attention_forward": {
        NARROW: [_config(4, 1, M=64, N=32), _config(8, 3, M=128, N=64)],
        WIDEST: [_config(8, 1, M=64, N=16)],
    },
    "attention_dkv": {
        NARROW: [_config(4, 1, M=32, N=64), _config(8, 1, M=32, N=128)],
        WIDEST: [_config(8, 1, M=16, N=16)],
    },
    "attention_dq": {NARROW: [_config(4, 1, N=32), _config(4, 2, N=32)]},
}
INTERPRETED = {  # time grows with the number of operations, so large blocks
    "attention_forward": _config(4, 1, M=256, N=256),
    "attention_dkv": _config(4, 1, M=256, N=256),
    "attention_dq": _config(4, 1, N=256),
    "attention_dbias": _config(4, 1, M=256, N=256),
    "tokens": _config(4, 1, N=256, K=256),
    "tokens_backward": _config(4, 1, N=256, K=256),
    "weights": _config(4, 1, M=256, N=256, K=256),
}


def shared_bytes(name: str, config: triton.Config, meta: dict, itemsize: int) -> int:
    """Shared memory a config asks for at most: its staged operand tiles, `num_stages` deep."""
    block = {k: v for k, v in {**meta, **config.kwargs}.items() if k.startswith("BLOCK_")}
    if name.startswith("attention"):
        staged, held = block["BLOCK_N"], block["BLOCK_M"]
        if name == "attention_dkv":
            staged, held = held, staged
        head = block["BLOCK_QK"] + block["BLOCK_V"]
        scratch = 0 if name == "attention_forward" else block["BLOCK_M"] * block["BLOCK_N"]
        tiles = itemsize * (head * (staged * config.num_stages + held) + scratch)
        added = sum(meta.get(operand) is not None for operand in ADDED)  # as float32 at most
        return tiles + 4 * added * (config.num_stages - 1) * block["BLOCK_M"] * block["BLOCK_N"]
    return itemsize * config.num_stages * block["BLOCK_K"] * (block["BLOCK_M"] + block["BLOCK_N"])


def fitting(name: str, arch: int, meta: dict, itemsize: int = 2) -> list[triton.Config]:
    """The configs of kernel `name` for these constants that fit compute capability `arch`, as 80 or 90."""
    limit = SHARED_BYTES.get(arch, min(SHARED_BYTES.values()))
    head = max(meta.get("BLOCK_QK", 0), meta.get("BLOCK_V", 0))
    held = min(held for held in CONFIGS[name] if held >= head)
    added = any(meta.get(operand) is not None for operand in ADDED)
    small, *rest = (added and WITH_ADDED.get(name, {}).get(held)) or CONFIGS[name][held]
    return [small, *(c for c in rest if shared_bytes(name, c, meta, itemsize) <= limit)]
