"""The only door from the engine to `nvit_kernels.sparse24`: masks, channel orders, compressed weights."""

from __future__ import annotations

from torch import Tensor

from nvit_kernels.sparse24 import mask_2to4
from nvit_kernels.sparse24.permute import search_channel_order

__all__ = ["CUSPARSELT", "CUTLASS", "compressed", "mask_2to4", "native", "search_channel_order"]

CUTLASS, CUSPARSELT = "CUTLASS", "cuSPARSELt"


def native() -> dict[str, str]:
    """Whether the compiled library's halves are loaded, or why not.

    >>> list(nvit.sparse24.native())
    ['CPU', 'CUDA']
    """
    from nvit_kernels import _native

    found = _native.load()
    return {"CPU": "there" if found.cpu else found.why_not_cpu, "CUDA": "there" if found.cuda else found.why_not_cuda}


def compressed(weight: Tensor, backend: str) -> Tensor:
    """A 2:4 weight `(out, in)` on CUDA as torch's sparse semi-structured tensor, packed by our compressor.

    Raises:
        ValueError: the shape does not fit the backend.

    >>> weight = torch.ones(32, 64, dtype=torch.float16)
    >>> weight[:, ::2] = 0  # two of four
    >>> nvit.sparse24.compressed(weight, nvit.sparse24.CUTLASS).shape
    torch.Size([32, 64])
    """
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    from nvit_kernels.sparse24 import compress_2to4
    from nvit_kernels.sparse24.cusparselt import compress_cusparselt

    if backend == CUTLASS:
        packed = compress_2to4(weight)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed.values, packed.meta, None, None, None)
    buffer = compress_cusparselt(weight)
    return SparseSemiStructuredTensorCUSPARSELT(weight.shape, buffer, None, None, None, None)
