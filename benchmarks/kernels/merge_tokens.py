"""What merging tokens costs on a CPU, as a share of the block that it happens in.

    python -m benchmarks.kernels.merge_tokens --threads 1 >> benchmarks/results/merge_tokens_cpu.csv

A block of DeiT-Ti on 197 tokens of which 16 merge, one row a batch size. `merge_ms` is the op as models call it,
`plain_ms` the same in plain torch, `sizes_ms` what log sizes in the logits add to attention, `unfused_ms` the same
merge as ToMe's own recipe writes it (scattered means over all tokens and channels). Each is the lower quartile of
rounds in which all are timed in turn. Right first: the op is compared with plain torch and with the recipe's means
before anything is timed. On a GPU: `python -m benchmarks.kernels merge_tokens`, by the cases of merge_cases.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from benchmarks.kernels.merge_cases import cases, unfused
from nvit_kernels import functional, reference

__all__ = ["cases", "main"]
TOKENS, WIDTH, HEADS, MERGED = 197, 192, 3, 16
BATCHES = (1, 8, 32)
FIELDS = ("case", "batch", "block_ms", "merge_ms", "plain_ms", "sizes_ms", "unfused_ms", "overhead", "plain_overhead",
          "unfused_overhead", "threads", "torch")  # fmt: skip


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Lower quartile of each call's own time on this thread, all of them in turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["block"]) < 8:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return {name: float(np.quantile(t, 0.25)) for name, t in times.items()}


def row(batch: int, seconds: float) -> dict[str, object]:
    torch.manual_seed(0)
    block, x = Block(WIDTH, HEADS, qkv_bias=True).eval(), torch.randn(batch, TOKENS, WIDTH)
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mask = torch.rand(batch, TOKENS).log()[:, None, None, :]
    merged, _, place = functional.merge_tokens(x, k, None, MERGED)
    plain, _, plain_place = reference.merge_tokens(x, k, None, MERGED)
    assert torch.equal(place, plain_place), "the op merges other tokens than plain torch; nothing is timed"
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-5)
    gap = (merged.sum(1).sort(-1).values - unfused(x, k, MERGED).sum(1).sort(-1).values).abs().max()
    assert gap < 1e-3, f"the op and the recipe disagree by {gap:.1e}; nothing is timed"
    took = milliseconds(
        {
            "block": lambda: block(x),
            "merge": lambda: functional.merge_tokens(x, k, None, MERGED),
            "plain": lambda: reference.merge_tokens(x, k, None, MERGED),
            "unfused": lambda: unfused(x, k, MERGED),
            "unsized": lambda: F.scaled_dot_product_attention(q, k, v),
            "sized": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        },
        seconds,
    )
    sizes = max(0.0, took["sized"] - took["unsized"])
    return {
        "case": f"{MERGED} of {TOKENS} tokens, width {WIDTH}",
        "batch": batch,
        "block_ms": round(took["block"], 3),
        "merge_ms": round(took["merge"], 3),
        "plain_ms": round(took["plain"], 3),
        "sizes_ms": round(sizes, 3),
        "unfused_ms": round(took["unfused"], 3),
        "overhead": round((took["merge"] + sizes) / took["block"], 4),
        "plain_overhead": round((took["plain"] + sizes) / took["block"], 4),
        "unfused_overhead": round((took["unfused"] + sizes) / took["block"], 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    table.writeheader()
    table.writerows(row(batch, arguments.seconds) for batch in BATCHES)


if __name__ == "__main__":
    main()
