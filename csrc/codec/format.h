// The six conversions: what a group is, which of it is kept, how it is written.
#pragma once

#include "convert.h"
#include "layout.h"

namespace nvit {

enum Fault : uint32_t { kNone = 0, kNaN = 1, kMask = 2, kMeta = 4 };

// What a group becomes: `values` (two elements, low first; one for pairs) and `code`, nibble | stored positions << 4.
struct Packed {
  uint64_t values;
  uint32_t code;
  uint32_t fault;
};

template <class T>
NVIT_INLINE T read(const void* p) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const T*>(p);
#else
  T t;
  __builtin_memcpy(&t, p, sizeof(T));
  return t;
#endif
}

template <class T>
NVIT_INLINE void write(void* p, T t) {
#if defined(__CUDA_ARCH__)
  *static_cast<T*>(p) = t;
#else
  __builtin_memcpy(p, &t, sizeof(T));
#endif
}

// 16-bit floats, kept as they are. kInfinity is the magnitude above which a bit pattern is NaN.
template <uint64_t kInfinity>
struct Same16 {
  using In = uint16_t;
  using Out = uint16_t;
  using Stored = uint32_t;  // the values of one group
  using Layout = Words16;
  static constexpr int kGroup = 4, kStored = 2, kOutBits = 16;
  static NVIT_INLINE uint64_t lanes(const In* group) { return read<uint64_t>(group); }
  static NVIT_INLINE uint64_t magnitudes(uint64_t lanes) { return lanes & ~kFlags; }
  static NVIT_INLINE uint64_t choose(const In*, uint64_t lanes) { return two_largest(magnitudes(lanes)); }
  static NVIT_INLINE uint32_t has_nan(const In*, uint64_t lanes) {
    return ((magnitudes(lanes) + (0x7fff - kInfinity) * 0x0001000100010001ull) & kFlags) != 0;
  }
};
using Half = Same16<0x7c00>;
using BFloat16 = Same16<0x7f80>;

// 32-bit masters to 16-bit values: chosen by the master's magnitude, zero or not by the value's.
template <class To>
struct Narrowed {
  using In = uint32_t;
  using Out = uint16_t;
  using Stored = uint32_t;
  using Layout = Words16;
  static constexpr int kGroup = 4, kStored = 2, kOutBits = 16;
  static NVIT_INLINE uint64_t lanes(const In* g) {
    return uint64_t{To::convert(g[0])} | uint64_t{To::convert(g[1])} << 16 | uint64_t{To::convert(g[2])} << 32 |
           uint64_t{To::convert(g[3])} << 48;
  }
  static NVIT_INLINE uint64_t magnitudes(uint64_t lanes) { return lanes & ~kFlags; }
  static NVIT_INLINE uint64_t choose(const In* g, uint64_t) {
    const uint32_t a = g[0] << 1, b = g[1] << 1, c = g[2] << 1, d = g[3] << 1;
    const uint32_t ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
    const uint32_t keep_a = (ab & ac) | ((ab | ac) & ad), keep_b = (bc & bd) | ((bc | bd) & (ab ^ 1));
    const uint32_t keep_c = ((ac ^ 1) & (bc ^ 1)) | (((ac & bc) ^ 1) & cd);
    const uint32_t keep_d = ((ad ^ 1) & (bd ^ 1)) | (((ad & bd) ^ 1) & (cd ^ 1));
    return to_flags(keep_a | keep_b << 1 | keep_c << 2 | keep_d << 3);
  }
  static NVIT_INLINE uint32_t has_nan(const In* g, uint64_t) {
    constexpr uint32_t kInfinity = 0xff000000;  // shifted left by one, the sign gone
    return (g[0] << 1 > kInfinity) | (g[1] << 1 > kInfinity) | (g[2] << 1 > kInfinity) | (g[3] << 1 > kInfinity);
  }
};

struct Int8 {
  using In = uint8_t;
  using Out = uint8_t;
  using Stored = uint16_t;
  using Layout = Words32;
  static constexpr int kGroup = 4, kStored = 2, kOutBits = 8;
  static NVIT_INLINE uint64_t lanes(const In* group) {
    const uint64_t x = read<uint32_t>(group);
    const uint64_t two = (x | x << 16) & 0x0000ffff0000ffffull;
    return (two | two << 8) & 0x00ff00ff00ff00ffull;
  }
  // |-128| is 128: (x ^ s) + (s & 1) for a sign s of all ones.
  static NVIT_INLINE uint64_t magnitudes(uint64_t lanes) {
    const uint64_t sign = lanes >> 7 & 0x0001000100010001ull;
    return (lanes ^ ((sign << 8) - sign)) + sign;
  }
  static NVIT_INLINE uint64_t choose(const In*, uint64_t lanes) { return two_largest(magnitudes(lanes)); }
  static NVIT_INLINE uint32_t has_nan(const In*, uint64_t) { return 0; }
};

// 32-bit floats: one of two, written as two 16-bit halves.
struct Pair {
  using In = uint32_t;
  using Out = uint32_t;
  using Stored = uint32_t;
  using Layout = Words16;
  static constexpr int kGroup = 2, kStored = 1, kOutBits = 32;
};

// The values at the nibble's two places.
template <class F>
NVIT_INLINE uint64_t gather(uint64_t lanes, uint64_t nibble) {
  constexpr uint64_t kOne = (uint64_t{1} << F::kOutBits) - 1;
  return (lanes >> first_index(nibble) * 16 & kOne) | (lanes >> second_index(nibble) * 16 & kOne) << F::kOutBits;
}

// `bits` is the group's part of a given mask, unused where kMasked is false.
template <class F, bool kMasked>
struct Pack {
  static NVIT_INLINE Packed group(const typename F::In* in, uint32_t bits) {
    uint64_t lanes = F::lanes(in);
    uint32_t fault = F::has_nan(in, lanes) * kNaN;
    uint64_t chosen;
    if constexpr (kMasked) {
      fault |= uint32_t(more_than_two(bits)) * kMask;
      chosen = to_flags(bits);
      lanes &= whole_lanes(chosen);
    } else {
      chosen = F::choose(in, lanes);
    }
    const uint64_t nibble = nibble_of(chosen & nonzero(F::magnitudes(lanes)));
    return {gather<F>(lanes, nibble), uint32_t(nibble | stored_bits(nibble) << 4), fault};
  }
};

template <bool kMasked>
struct Pack<Pair, kMasked> {
  static NVIT_INLINE Packed group(const uint32_t* in, uint32_t bits) {
    uint32_t a = in[0], b = in[1], fault = ((a << 1 > 0xff000000u) | (b << 1 > 0xff000000u)) * kNaN;
    if constexpr (kMasked) {
      fault |= uint32_t(more_than_one_of_two(bits)) * kMask;
      a &= -(bits & 1);
      b &= -(bits >> 1 & 1);
    }
    const uint32_t first = (a << 1 >= b << 1) & (a << 1 != 0);  // else the second, zero or not, as torch does
    return {first ? a : b, first ? 4u | 1u << 4 : 14u | 2u << 4, fault};
  }
};

// A group of values at the nibble's places of `in`, for metadata that stays.
template <class F>
NVIT_INLINE Packed repack_group(const typename F::In* in, uint64_t nibble) {
  const uint64_t lanes = F::lanes(in);
  return {gather<F>(lanes, nibble), 0, F::has_nan(in, lanes) * kNaN | uint32_t(is_nibble(nibble) ^ 1) * kMeta};
}
template <>
NVIT_INLINE Packed repack_group<Pair>(const uint32_t* in, uint64_t nibble) {
  const uint32_t nan = (in[0] << 1 > 0xff000000u) | (in[1] << 1 > 0xff000000u);
  return {nibble == 4 ? in[0] : in[1], 0, nan * kNaN | uint32_t(is_pair_nibble(nibble) ^ 1) * kMeta};
}

// The dense group, as one word (16-bit elements), half a word (8-bit) or two 32-bit elements.
template <class F>
NVIT_INLINE uint64_t unpack_group(uint64_t values, uint64_t nibble) {
  constexpr uint64_t kOne = (uint64_t{1} << F::kOutBits) - 1;
  return (values & kOne) << first_index(nibble) * F::kOutBits |
         (values >> F::kOutBits & kOne) << second_index(nibble) * F::kOutBits;
}
template <>
NVIT_INLINE uint64_t unpack_group<Pair>(uint64_t value, uint64_t nibble) {
  return nibble == 4 ? value : value << 32;
}
template <class F>
NVIT_INLINE uint32_t nibble_fault(uint64_t nibble) {
  return uint32_t((F::kGroup == 2 ? is_pair_nibble(nibble) : is_nibble(nibble)) ^ 1) * kMeta;
}

}  // namespace nvit
