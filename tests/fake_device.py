"""A device that is none: its tensors compute on the CPU, but whatever a GPU would refuse or wait for is noticed.

`torch.device("lazy")` needs no driver and no registration, and autograd serves it in the calling thread. Inside
`FakeDevice` its tensors are wrappers of CPU tensors; an operation that mixes them with the CPU's raises, and so does,
inside `quiet`, all that makes the host wait for the device: a number that is read, a shape that depends on one, a
tensor that is sent without `non_blocking`. On a real GPU `quiet` is CUDA's own `set_sync_debug_mode`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FAKE = torch.device("lazy:0")

READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "multinomial", "repeat_interleave",
}  # fmt: skip
"""Operations whose result, or its shape, the host has to know. `multinomial` checks its probabilities."""

INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "_copy_from"}


class Waits(AssertionError):
    """The host would wait for the device."""


class OnFake(Tensor):
    """A tensor on the fake device; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnFake:
        lies = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # a wrapper made in it could not be a view of one made outside
            return Tensor._make_wrapper_subclass(cls, held.shape, **lies, device=FAKE)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"{self.held!r} on a fake device"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside FakeDevice")


class _Makers(TorchFunctionMode):
    """What dispatch modes do not see: `torch.tensor` makes its tensor elsewhere, `tolist` refuses wrappers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and is_fake(kwargs.get("device")):
            device, wanted = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(device).requires_grad_(wanted)
        if func is Tensor.tolist and isinstance(args[0], OnFake):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def is_fake(device: Any) -> bool:
    return device is not None and (device == FAKE or torch.device(device).type == FAKE.type)


def tensors(tree: Any) -> Iterator[Tensor]:
    for x in tree:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from tensors(x)


def held(x: Any) -> Any:
    if isinstance(x, OnFake):
        return x.held
    return type(x)(map(held, x)) if isinstance(x, (tuple, list)) else x


def wrapped(x: Any, same: dict[int, OnFake]) -> Any:
    if isinstance(x, Tensor):
        return same[id(x)] if id(x) in same else OnFake(x)
    return type(x)(wrapped(t, same) for t in x) if isinstance(x, (tuple, list)) else x


class _Again(contextlib.AbstractContextManager):
    """The mode inside its own handler."""

    def __init__(self, mode: TorchDispatchMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        TorchDispatchMode.__enter__(self.mode)

    def __exit__(self, *error) -> None:
        TorchDispatchMode.__exit__(self.mode, *error)


class FakeDevice(TorchDispatchMode):
    """While it is entered, `FAKE` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self.makers, self.waiting_raises = _Makers(), False
        self.again = _Again(self)

    def __enter__(self) -> FakeDevice:
        self.makers.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.makers.__exit__(*error)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, whatever makes the host wait raises `Waits`."""
        self.waiting_raises = True
        try:
            yield
        finally:
            self.waiting_raises = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking takes longer than most operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        leaves = list(tensors((args, tuple(kwargs.values()))))
        there = [t for t in leaves if isinstance(t, OnFake)]
        to = kwargs.get("device")
        arrives = bool(there) if to is None else is_fake(to)
        if not (there or arrives):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and (parts := self._divided(func, args, kwargs)) is not NotImplemented:
            return parts
        if name in COPIES:
            self._copied(name, args, kwargs, arrives)
        elif there:
            self._checked(name, func, args, leaves)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*held(args), **{key: held(value) for key, value in kwargs.items()})
        if name == "copy_":
            return leaves[0]
        if not arrives:
            return out
        return wrapped(out, {id(t.held): t for t in there})

    def _divided(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation made of others returns; in inference mode it comes as one."""
        with self.again:
            return func.decompose(*args, **kwargs)

    def _copied(self, name: str, args: tuple, kwargs: dict, arrives: bool) -> None:
        source, into = (args[1], isinstance(args[0], OnFake)) if name == "copy_" else (args[0], arrives)
        was = isinstance(source, OnFake)
        late = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if was and not into:
            self._waits(f"{name} brings {tuple(source.shape)} back")
        elif into and not was and not late:
            self._waits(f"{name} sends {tuple(source.shape)} {source.dtype} there")

    def _checked(self, name: str, func: Any, args: tuple, leaves: list[Tensor]) -> None:
        if name in READS:
            self._waits(f"{name} has a result that the host must know")
        here = [t for t in leaves if not isinstance(t, OnFake)]
        if name in INDEXING:
            indices = [t for t in args[1] if t is not None]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                self._waits(f"{name} by a mask")
            if any(not isinstance(t, OnFake) for t in indices):
                self._waits(f"{name} by indices of the CPU")
            here = [t for t in here if not any(t is i for i in indices)]
        if any(t.dim() for t in here):
            shapes = ", ".join(f"{tuple(t.shape)} on the {'GPU' if isinstance(t, OnFake) else 'CPU'}" for t in leaves)
            raise RuntimeError(f"{func}: tensors of two devices: {shapes}")

    def _waits(self, why: str) -> None:
        if self.waiting_raises:
            raise Waits(why)


def known_to_torch(monkeypatch) -> None:
    """Have torch serve the device where it asks for one on a list: autocast, off, and fused optimisers."""
    real = torch.autocast

    def autocast(device: str, *args, enabled: bool = True, **kwargs):
        off = is_fake(device) and not enabled
        return contextlib.nullcontext() if off else real(device, *args, enabled=enabled, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)
    optimizers = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim hides it
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", FAKE.type])


@contextlib.contextmanager
def quiet_cuda() -> Iterator[None]:
    """Inside, whatever makes the host wait for CUDA raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
