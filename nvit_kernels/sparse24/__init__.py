"""2:4 sparsity: compress, repack and decompress (`compress`), cuSPARSELt's form, channel orders, transposable masks."""

from nvit_kernels.sparse24.compress import (
    Sparse24,
    compress_2to4,
    compress_2to4_many,
    decompress_2to4,
    fits_2to4,
    mask_2to4,
    pack_bits,
    repack_2to4,
    repack_2to4_many,
    unpack_bits,
)

__all__ = [
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
