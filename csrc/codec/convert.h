// float bits to half and bfloat16 bits, rounded to nearest even as torch does. NaN is refused before it gets here.
#pragma once

#include "group.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace nvit {

NVIT_INLINE float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}

NVIT_INLINE uint32_t as_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
#endif
}

struct ToHalf {
  static NVIT_INLINE uint32_t convert(uint32_t x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(__uint_as_float(x)));
#else
    const uint32_t sign = x >> 16 & 0x8000, magnitude = x & 0x7fffffff;
    // Below 2^-14 the result is denormal: adding 0.5 lines its last bit up with a float's, and the adder rounds.
    const uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
    const uint32_t normal = rounded >> 13;
    // Blends by all-ones masks of signed differences: every vector instruction set has them.
    const uint32_t is_small = uint32_t(int32_t(magnitude - 0x38800000) >> 31);
    const uint32_t is_finite = uint32_t(int32_t(magnitude - 0x477ff000) >> 31);  // from 65520 on it is infinity
    const uint32_t finite = (small & is_small) | (normal & ~is_small);
    return sign | (finite & is_finite) | (0x7c00u & ~is_finite);
#endif
  }
};

struct ToBFloat16 {
  static NVIT_INLINE uint32_t convert(uint32_t x) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(x)));
#else
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
#endif
  }
};

}  // namespace nvit
