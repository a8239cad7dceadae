"""Whether what is about to be written is the model: the same function, and the same bytes on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import adapters
from ..spec import ViTSpec
from ..utils.files import short
from ..utils.tensors import DTYPES, bytes_of, raw_tensors, read_header
from .skeleton import filled, skeleton

IMAGES = 2
"""In the batch that both models see."""

FULL, HALF = 1e-5, 1e-2
"""How far outputs may differ, of their largest: in fp32 and fp64, and where a weight has 16 bits."""


def check_function(model: nn.Module, spec: ViTSpec, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the model that is rebuilt from `spec`, by way of its JSON, and `state` computes what
    `model` does, on one seeded batch in eval mode.

    The rebuilt model shares `state`'s memory, so that it costs no second copy: activations of `IMAGES` images alone.
    """
    try:
        twin = filled(skeleton(ViTSpec.from_json(spec.to_json())), state)
    except ValueError as e:
        raise ValueError(f"the spec read from this {spec.architecture} builds no model: {short(e, 200)}") from None
    images = _images(model)
    try:
        found = _outputs(model, images)
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as e:
        raise ValueError(
            f"this {spec.architecture} does not run on images of its own size {tuple(images.shape[1:])}: {short(e)}; "
            "save a model that runs"
        ) from None
    expected = _outputs(twin, images)
    for mine, theirs in zip(found, expected, strict=True):
        off = _difference(mine, theirs)
        if not off <= (allowed := _tolerance(state)):
            raise ValueError(
                f"the model rebuilt from what would be saved computes something else: outputs are off by {off:.1e} of "
                f"their size, {allowed:.0e} is allowed. Something was changed that a snapshot cannot say (a hook, a "
                "forward, a mask set by hand); undo it, nothing was written"
            )


def check_bytes(file: Path, state: Mapping[str, Tensor]) -> None:
    """Raise OSError unless a weights file holds exactly `state`; it is read back one tensor at a time."""
    left = dict(state)
    for name, entry, found in raw_tensors(file):
        mine = left.pop(name, None)
        if mine is None or entry.shape != tuple(mine.shape) or entry.dtype != mine.dtype:
            raise OSError(f"{file} was not written as it should be: {name} is another")
        if not torch.equal(found, bytes_of(mine)):
            raise OSError(f"{file} does not read back as it was written ({name}); check the disk")
    if left:
        raise OSError(f"{file} was not written as it should be: {next(iter(left))} is missing")


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """What a weights file holds; none of it is read for that.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return {name: entry.shape for name, entry in read_header(file).items()}
    except ValueError as e:
        raise ValueError(f"{file} is damaged: {e}") from None


def check_shapes(where: Path, found: Mapping[str, tuple[int, ...]], model: nn.Module, said: str) -> None:
    """Raise ValueError unless the weights at `where` are those of the model that the file `said` describes."""
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    odd = [f"{what} {short(names[:3])}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    wrong = next((name for name, shape in expected.items() if found.get(name, shape) != shape), None)
    if wrong is not None and not odd:
        odd = [f"{wrong} is {short(found[wrong], 40)}, expected {short(expected[wrong], 40)}"]
    if odd:
        raise ValueError(f"{where} does not fit {said}: {'; '.join(odd)}")


def check_tensors(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor cannot be written: compressed, sharded, without memory, or of a dtype of which
    nvit knows nothing."""
    for name, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; a snapshot holds plain tensors. Load with sparse=False to save "
                "again, gather shards first"
            )
        if tensor.is_meta or tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} is a {tensor.dtype} tensor on {tensor.device}, which cannot be saved")


def _images(model: nn.Module) -> Tensor:
    p = next(model.parameters())
    size = adapters.preprocess(model)["input_size"]
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0))
    return images.to(p.device, p.dtype)


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    dtypes = {p.dtype for p in model.parameters()}
    mixed = torch.autocast(images.device.type, min(dtypes, key=lambda d: d.itemsize)) if len(dtypes) > 1 else None
    with evaluating(model), torch.no_grad(), mixed or nullcontext():
        return [t for t in adapters.of(model).logits(model, images) if t is not None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every layer is in eval mode; afterwards each as before."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tolerance(state: Mapping[str, Tensor]) -> float:
    return HALF if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in state.values()) else FULL


def _difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference of outputs, as a fraction of their largest; those that are not finite have to be alike."""
    if mine.shape != theirs.shape:
        return float("inf")
    mine, theirs = mine.double(), theirs.double()
    finite = mine.isfinite()
    if not torch.equal(finite, theirs.isfinite()) or not torch.equal(mine[~finite].isnan(), theirs[~finite].isnan()):
        return float("inf")
    mine, theirs = mine[finite], theirs[finite]
    if not mine.numel():
        return 0.0
    return float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-30))
