"""A model run block by block: what enters the next block is kept for every batch, so that a block can run many times
while what it holds changes, and no block runs again for those behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import adapters
from .stand_in import standing_in


class Reached(Exception):
    """Raised inside a forward pass to end it."""


class _Stop(nn.Module):
    """Ends the pass with what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[tuple, dict] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.found = args, kwargs
        raise Reached


class _Fixed(nn.Module):
    """Answers every call alike."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.out


class Replay:
    """Batches on their way through a model.

    Attributes:
        blocks: the modules, in order.
        at: the block that `inputs` enter; `len(blocks)` once they are through.
        inputs: by batch, `(args, kwargs)` of that block; once they are through, the logits in place of `args`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.adapter, self.at = model, adapters.of(model), 0
        self.blocks = self.adapter.blocks(model)
        self.shapes: list[Any] = []
        self.inputs: list[tuple[tuple, dict]] = []
        self.sizes: list[torch.Size] = []
        self._settled: dict[nn.Module, list[Any]] = {}

    def enter(self, images: Tensor) -> None:
        """Add a batch, at the first block."""
        self.sizes.append(images.shape)
        self.inputs.append(_until(self.model, self.blocks[0], images))

    def __len__(self) -> int:
        return len(self.inputs)

    def run(self, batch: int) -> Any:
        """The current block's output."""
        args, kwargs = self.inputs[batch]
        with standing_in(self.blocks[self.at], {m: _Fixed(outs[batch]) for m, outs in self._settled.items()}):
            return self.blocks[self.at](*args, **kwargs)

    def settle(self, layer: nn.Module, changing: Iterable[nn.Module]) -> None:
        """Until `advance`, a layer of the current block gives what it gives now, and does not run again.

        Nothing happens where one of `changing`, which may change meanwhile, runs before it. Memory: its output.
        """
        outs: list[Any] = []

        def found(_module: nn.Module, _args: tuple, out: Any) -> None:
            outs.append(out)
            raise Reached

        def too_early(*_: Any) -> None:
            raise Reached

        handles = [layer.register_forward_hook(found), *(m.register_forward_pre_hook(too_early) for m in changing)]
        try:
            for b in range(len(self)):
                with contextlib.suppress(Reached):
                    self.run(b)
                if len(outs) == b:
                    return
        finally:
            for handle in handles:
                handle.remove()
        self._settled[layer] = outs

    def advance(self) -> None:
        """Through the current block and what the host does up to the next; weights are read as they are now."""
        last = self.at + 1 == len(self.blocks)
        for b in range(len(self)):
            out = self.run(b)
            if b == 0:
                self.shapes.append(tree_map(_blank, out))
            self.inputs[b] = self._behind(b, out, None if last else self.blocks[self.at + 1])
        self.at += 1
        self._settled.clear()

    def rest(self, batch: int, out: Any) -> Any:
        """The logits where the current block's output is `out`; blocks behind it run as they are now."""
        return self._behind(batch, out, None)[0]

    def _behind(self, batch: int, out: Any, block: nn.Module | None) -> tuple[tuple, dict]:
        """`_until` a block behind the current one, whose output is `out`."""
        skipped = [_resized(s, self.sizes[0][0], 1) for s in self.shapes[: self.at]]
        return _until(self.model, block, _one_like(self.sizes[batch], self.model), [*skipped, out])


def logits_behind(model: nn.Module, outs: Sequence[Any], images: Tensor) -> Any:
    """The logits where the first blocks' outputs are `outs`, of which only the last one's values matter. These blocks
    do not run; `images` enter a model of which none is given, else only their shape matters, and one is enough."""
    return _until(model, None, _one_like(images.shape, model) if outs else images, outs)[0]


def _one_like(size: torch.Size, model: nn.Module) -> Tensor:
    """One image in place of a batch, for what runs before blocks whose outputs are known."""
    like = next(model.parameters())
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(1, *size[1:])


def _until(model: nn.Module, block: nn.Module | None, images: Tensor, outs: Sequence[Any] = ()) -> tuple[tuple, dict]:
    """What a block is called with, the first ones replaced by their outputs; the logits where `block` is None."""
    adapter, stop = adapters.of(model), _Stop()
    stand_ins = {b: _Fixed(out) for b, out in zip(adapter.blocks(model), outs, strict=False)}
    if block is not None:
        stand_ins[block] = stop
    with standing_in(model, stand_ins), contextlib.suppress(Reached):
        return adapter.logits(model, images), {}
    return stop.found


def _blank(t: Any) -> Any:
    """Zeros of a tensor's shape, without its memory."""
    return t.new_zeros(()).expand(t.shape) if isinstance(t, Tensor) else t


def _resized(tree: Any, was: int, now: int) -> Any:
    """Blanks for another number of images; windows and images share the first dimension."""
    if was == now:
        return tree
    return tree_map(lambda t: t[:1].expand(t.shape[0] * now // was, *t.shape[1:]) if isinstance(t, Tensor) else t, tree)
