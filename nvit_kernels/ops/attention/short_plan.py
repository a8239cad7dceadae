"""What attention over short rows takes, and what is worked out once for operands of one description."""

from __future__ import annotations

import torch
from torch import Tensor

from nvit_kernels.launch import INTERPRET, describe, power_of_two, remember
from nvit_kernels.ops.attention import operands
from nvit_kernels.ops.attention.short_kernels import backward_kernel, forward_kernel, scores_kernel
from nvit_kernels.ops.attention.short_layouts import (
    LARGEST_HEAD,
    LARGEST_TOKENS,
    Config,
    architecture,
    backward_config,
    backward_keys,
    forward_config,
    key_pieces,
    padded,
)
from nvit_kernels.tuning import Launch

UNITS = 16  # of a score buffer, a program


def takes(q: Tensor, v_width: int, gradients: bool = True) -> bool:
    """Whether these kernels are offered for q `(batch, heads, tokens, qk_dim)` and values of `v_width` dims a head.

    They are for float16 and bfloat16, at most 208 tokens and heads of at most 64 dims; with `gradients` also only where
    the backward has a layout that fits the device. float32 is for the interpreter alone.
    """
    tokens, width = q.shape[2:]
    dtypes = (torch.float16, torch.bfloat16) if q.is_cuda else (torch.float16, torch.float32) if INTERPRET else ()
    if q.dtype not in dtypes or tokens > LARGEST_TOKENS or width % 8 or v_width % 8:
        return False
    if not 0 < width <= LARGEST_HEAD or not 0 < v_width <= LARGEST_HEAD or not q.numel():
        return False
    return not gradients or backward_config(architecture(q.device), tokens, width, v_width) is not None


class Plan:
    """What is worked out once for operands of one description; its launches are prepared at their first use.

    Attributes:
        readable: the kernels read q, k, v where they are.

    Raises:
        ValueError: shapes or dtypes disagree, or `takes` is False.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        operands.check(q, k, v)
        (self.batch, self.heads, self.tokens, self.qk), self.v = q.shape, v.shape[-1]
        if not takes(q, self.v, gradients=False):
            raise ValueError(f"attention_short is not offered for {q.dtype} {tuple(q.shape)} with values of {self.v} "
                             f"dims on {q.device}; nvit_kernels.functional.attention takes other shapes")  # fmt: skip
        (q_, k_), v_ = operands.readable_alike(q, k), operands.readable(v)
        self.readable = q_ is q and k_ is k and v_ is v
        self.arch = architecture(q.device)
        self.backward_config = backward_config(self.arch, self.tokens, self.qk, self.v)
        self.sizes = dict(
            H=self.heads,
            QK8=self.qk // 8,
            V8=self.v // 8,
            **operands.strides8("qk", q_),
            **operands.strides8("v", v_),
            N=self.tokens,
        )
        self.launches: dict[tuple, Launch] = {}

    def forward(self, config: Config | None = None) -> Launch:
        """The forward's launch, in a layout other than the usual if one is given."""
        run = self.launches.get(("forward", config))
        if run is None:
            pieces = dict(zip(("KEYS_A", "KEYS_B", "KEYS_C"), key_pieces(self.tokens), strict=True))
            blocks = dict(BLOCK_QK=power_of_two(self.qk), BLOCK_V=power_of_two(self.v))
            fixed = self._fixed(config or forward_config(self.arch, self.tokens), blocks | pieces)
            run = self.launches["forward", config] = Launch(forward_kernel, (self.batch * self.heads,), fixed)
        return run

    def backward(self, packed: bool, config: Config | None = None) -> Launch:
        """The backward's launch, likewise.

        Raises:
            ValueError: no layout of it fits the device.
        """
        run = self.launches.get(("backward", packed, config))
        if run is None:
            self.check_backward()
            said = config or self.backward_config
            block_qk, block_v = padded(self.arch, said.rows, self.qk, self.v)
            keys = backward_keys(self.arch, self.tokens)
            blocks = dict(PACKED=packed, KEYS=keys, CHUNK=min(keys, 128), BLOCK_QK=block_qk, BLOCK_V=block_v)
            run = Launch(backward_kernel, (self.batch * self.heads,), self._fixed(said, blocks))
            self.launches["backward", packed, config] = run
        return run

    def scores(self, samples: tuple[int, int, int]) -> Launch:
        """The launch that adds partial sums to qk, v and head buffers, each entry from so many samples."""
        run = self.launches.get(samples)
        if run is None:
            widest = max(self.heads, self.qk, self.v)
            grid = (-(-widest // UNITS), self.batch if 1 in samples else 1, 3)
            counts = dict(zip(("qk_samples", "v_samples", "head_samples"), samples, strict=True))
            counts |= dict(B=self.batch, H=self.heads, D=self.qk, E=self.v)
            rows = min(256, power_of_two(self.batch * self.heads))
            run = self.launches[samples] = Launch(scores_kernel, grid, {**counts, "ROWS": rows, "UNITS": UNITS})
        return run

    def check_backward(self) -> None:
        """Raise `ValueError` unless the backward is offered on this device."""
        if self.backward_config is None:
            raise ValueError(f"attention_short has no backward for {self.tokens} tokens and heads of {self.qk} and "
                             f"{self.v} dims on sm_{self.arch}; ask `takes` first")  # fmt: skip

    def _fixed(self, config: Config, blocks: dict[str, object]) -> dict[str, object]:
        layout = dict(BLOCK_M=config.rows, STAGES=config.stages, num_warps=config.warps, num_stages=1)
        return self.sizes | blocks | layout


_plans: dict[tuple, Plan] = {}


def read(q: Tensor, k: Tensor, v: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """The plan of these operands, and they as the kernels read them.

    Raises:
        ValueError: see `Plan`.
    """
    key = ((q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0, *describe(q, k, v))
    plan = _plans.get(key) or remember(_plans, key, Plan(q, k, v))
    if not plan.readable:
        (q, k), v = operands.readable_alike(q, k), operands.readable(v)
    return plan, q, k, v


def read_mass(plan: Plan, mass: Tensor | None) -> Tensor | None:
    """What is added to the logits of a plan's keys, as the kernels read it: dense, without its history.

    It is no part of a plan's description, since no launch depends on more of it than whether it is there.

    Raises:
        ValueError: it is not float32 `(batch, tokens)`.
    """
    if mass is None or (mass.shape == (plan.batch, plan.tokens) and mass.dtype == torch.float32):
        return None if mass is None else mass.detach().contiguous()
    raise ValueError(f"mass is {mass.dtype} {tuple(mass.shape)}, expected torch.float32 (batch, tokens), "
                     f"{(plan.batch, plan.tokens)}: the log of how many tokens each stands for")  # fmt: skip
