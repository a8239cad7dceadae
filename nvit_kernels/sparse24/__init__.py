"""2:4 sparsity: compress, repack, decompress (`compress`), the same for whole models again and again (`plan`),
cuSPARSELt's form, channel orders, transposable masks."""

from nvit_kernels.sparse24.compress import (
    Sparse24,
    compress_2to4,
    compress_2to4_many,
    decompress_2to4,
    fits_2to4,
    mask_2to4,
    repack_2to4,
    repack_2to4_many,
)
from nvit_kernels.sparse24.plain import pack_bits, unpack_bits
from nvit_kernels.sparse24.plan import CompressPlan, RepackPlan

__all__ = [
    "CompressPlan",
    "RepackPlan",
    "Sparse24",
    "compress_2to4",
    "compress_2to4_many",
    "decompress_2to4",
    "fits_2to4",
    "mask_2to4",
    "pack_bits",
    "repack_2to4",
    "repack_2to4_many",
    "unpack_bits",
]
