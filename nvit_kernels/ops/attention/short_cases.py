"""Compile the short-row kernels ahead of time as they are offered, and say how many programs a processor holds.

python -m nvit_kernels.ops.attention.short_cases 90
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import triton

from nvit_kernels.aot import Case, Report, absent, compile_case
from nvit_kernels.launch import power_of_two
from nvit_kernels.ops.attention import short_kernels as kernels
from nvit_kernels.ops.attention import short_layouts as layouts

# tokens, qk, v
SHAPES = ((197, 64, 64), (197, 24, 56), (197, 8, 8), (160, 64, 32), (128, 64, 64), (50, 32, 32), (49, 64, 64))
MASSES = (("", ("mass",)), (" mass", ()))
SHARED_PER_PROCESSOR = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}
WARPS_PER_PROCESSOR = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}
SUMS = ("mass", "lse", "head_part", "head_scores", "qk_scores", "v_scores")
TENSORS = ("q", "k", "v", "o", "do", "dq", "dk", "dv")


def cases(arch: int, dtype: str = "bf16") -> Iterator[tuple[Case, triton.Config]]:
    """Every layout offered on `arch`, as 90, with the launch options it has there."""
    types = (*((name, "*fp32") for name in SUMS), *((name, f"*{dtype}") for name in TENSORS))
    for tokens, qk, v in SHAPES:
        config, tag = layouts.forward_config(arch, tokens), f"{tokens} tokens {qk}/{v} {dtype}"
        pieces = dict(zip(("KEYS_A", "KEYS_B", "KEYS_C"), layouts.key_pieces(tokens), strict=True))
        sizes = dict(BLOCK_QK=power_of_two(qk), BLOCK_V=power_of_two(v))
        constants = dict(N=tokens, BLOCK_M=config.rows, STAGES=config.stages) | pieces | sizes
        for mass, without in MASSES:
            held = constants | absent(*without)
            yield Case(f"forward {tag}{mass}", kernels.forward_kernel, held, overrides=types), _options(config)
        config, keys = layouts.backward_config(arch, tokens, qk, v), layouts.backward_keys(arch, tokens)
        if config is None:
            continue
        block_qk, block_v = layouts.padded(arch, config.rows, qk, v)
        constants = dict(N=tokens, PACKED=False, KEYS=keys, CHUNK=min(keys, 128), BLOCK_M=config.rows,
                         BLOCK_QK=block_qk, BLOCK_V=block_v, STAGES=config.stages)  # fmt: skip
        constants |= {} if config.delta_first else absent("delta")
        for mass, without in MASSES:
            held = constants | absent(*without)
            yield Case(f"backward {tag}{mass}", kernels.backward_kernel, held, overrides=types), _options(config)
    constants = dict(ROWS=256, UNITS=16)
    yield (
        Case("scores", kernels.scores_kernel, constants, overrides=types),
        triton.Config({}, num_warps=4, num_stages=1),
    )


def _options(config: layouts.Config) -> triton.Config:
    return triton.Config({}, num_warps=config.warps, num_stages=1)


def programs_per_processor(report: Report, warps: int) -> int:
    """How many programs fit on a processor by registers (given a warp in 256s), shared memory and warps."""
    registers = -(-report.registers * 32 // 256) * 256 * warps
    shared = report.shared + (1 << 10)  # what the system keeps of a block's share
    return min(
        65536 // registers, SHARED_PER_PROCESSOR[report.arch] // shared, WARPS_PER_PROCESSOR[report.arch] // warps
    )


def main(arch: int) -> None:
    """Print, one JSON object a line, what each layout offered on `arch` takes; the widest in float16 too."""
    for dtype in ("bf16", "fp16"):
        for case, options in cases(arch, dtype):
            if dtype == "bf16" or "197 tokens 64/64" in case.name:
                report = compile_case(case, arch, options)
                fits = programs_per_processor(report, options.num_warps)
                held = {"programs_per_processor": fits, "warps_per_processor": fits * options.num_warps}
                print(json.dumps(asdict(report) | held), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
