// A band of 32 rows by up to 1024 columns on one core. Compiled once per instruction set; NVIT_ISA names the copy.
#pragma once

#include "../codec/format.h"
#include "../codec/job.h"

namespace nvit {
namespace NVIT_ISA {

constexpr int kMaxGroups = kBandCols / 2;

// Indices are 64-bit: Python builds with -fwrapv, under which a 32-bit index times a stride keeps loops scalar.
#define NVIT_VECTOR _Pragma("GCC ivdep")

// The mask of each group as a number, for either form a mask comes in.
template <class F, Mask kind>
void read_mask(const uint8_t* __restrict mask, int groups, uint8_t* __restrict bits) {
  constexpr int kPerByte = 8 / F::kGroup;
  if constexpr (kind == Mask::kBits) {
    for (int64_t g = 0; g < groups; g += kPerByte) {
      for (int i = 0; i < kPerByte; ++i) bits[g + i] = mask[g / kPerByte] >> i * F::kGroup & ((1 << F::kGroup) - 1);
    }
  } else if constexpr (F::kGroup == 4) {
    NVIT_VECTOR for (int64_t g = 0; g < groups; ++g) {
      const uint32_t m = read<uint32_t>(mask + g * 4) & 0x01010101;
      bits[g] = static_cast<uint8_t>((m | m >> 7 | m >> 14 | m >> 21) & 15);
    }
  } else {
    NVIT_VECTOR for (int64_t g = 0; g < groups; ++g) bits[g] = (mask[g * 2] & 1) | (mask[g * 2 + 1] & 1) << 1;
  }
}

// `codes` holds the group's mask on the way in where there is one.
template <class F, bool kMasked>
uint32_t compress_row(const typename F::In* __restrict in, int groups, typename F::Stored* __restrict values,
                      uint8_t* __restrict codes) {
  uint32_t fault = 0;
  NVIT_VECTOR for (int64_t g = 0; g < groups; ++g) {
    const Packed p = Pack<F, kMasked>::group(in + g * F::kGroup, kMasked ? codes[g] : 0);
    values[g] = static_cast<typename F::Stored>(p.values);
    codes[g] = static_cast<uint8_t>(p.code);
    fault |= p.fault;
  }
  return fault;
}

template <class F>
uint32_t repack_row(const typename F::In* __restrict in, const uint8_t* __restrict codes, int groups,
                    typename F::Stored* __restrict values) {
  uint32_t fault = 0;
  NVIT_VECTOR for (int64_t g = 0; g < groups; ++g) {
    const Packed p = repack_group<F>(in + g * F::kGroup, codes[g]);
    values[g] = static_cast<typename F::Stored>(p.values);
    fault |= p.fault;
  }
  return fault;
}

template <class F>
uint32_t decompress_row(const typename F::Stored* __restrict values, const uint8_t* __restrict codes, int groups,
                        typename F::Out* __restrict out) {
  uint32_t fault = 0;
  NVIT_VECTOR for (int64_t g = 0; g < groups; ++g) {
    const uint64_t dense = unpack_group<F>(values[g], codes[g]);
    if constexpr (F::kOutBits == 8) {
      write<uint32_t>(out + g * F::kGroup, static_cast<uint32_t>(dense));
    } else {
      write<uint64_t>(out + g * F::kGroup, dense);
    }
    fault |= nibble_fault<F>(codes[g]);
  }
  return fault;
}

// Four codes' nibbles as one 16-bit word, and back.
NVIT_INLINE uint16_t join(const uint8_t* codes) {
  uint32_t x = read<uint32_t>(codes) & 0x0f0f0f0f;
  x |= x >> 4;
  return static_cast<uint16_t>((x & 0xff) | (x >> 8 & 0xff00));
}
NVIT_INLINE void split(uint16_t word, uint8_t* codes) {
  uint32_t x = (word | word << 8) & 0x00ff00ff;
  write<uint32_t>(codes, (x | x << 4) & 0x0f0f0f0f);
}

// Where a band lies in its matrix.
struct Band {
  int row, rows, col, groups;
  template <class F>
  static Band of(const Job& job, int unit) {
    const int bands = (job.rows + kBandRows - 1) / kBandRows;
    const int row = unit % bands * kBandRows, col = unit / bands * kBandCols;
    const int rows = job.rows - row < kBandRows ? job.rows - row : kBandRows;
    const int cols = job.cols - col < kBandCols ? job.cols - col : kBandCols;
    return {row, rows, col, cols / F::kGroup};
  }
};

template <class F>
void store_meta(const Job& job, const Band& b, const uint8_t (*codes)[kMaxGroups]) {
  constexpr int kQuads = F::Layout::kBlockGroups / 4;
  uint16_t* meta = static_cast<uint16_t*>(job.meta);
  const int first = b.col / F::kGroup / 4;
  for (int quad = 0; quad < b.groups / 4; quad += kQuads) {
    for (int r = 0; r < b.rows; ++r) {
      for (int q = quad; q < quad + kQuads; ++q) {
        meta[word16<typename F::Layout>(b.row + r, first + q, job.rows)] = join(codes[r] + q * 4);
      }
    }
  }
}

template <class F>
void load_meta(const Job& job, const Band& b, uint8_t (*codes)[kMaxGroups]) {
  constexpr int kQuads = F::Layout::kBlockGroups / 4;
  const uint16_t* meta = static_cast<const uint16_t*>(job.meta);
  const int first = b.col / F::kGroup / 4;
  for (int quad = 0; quad < b.groups / 4; quad += kQuads) {
    for (int r = 0; r < b.rows; ++r) {
      for (int q = quad; q < quad + kQuads; ++q) {
        split(meta[word16<typename F::Layout>(b.row + r, first + q, job.rows)], codes[r] + q * 4);
      }
    }
  }
}

template <class F>
void store_bitmask(const Job& job, const Band& b, int r, const uint8_t* __restrict codes) {
  uint8_t* __restrict out = job.bitmask + (int64_t{b.row + r} * job.cols + b.col) / 8;
  const int bytes = b.groups * F::kGroup / 8;
  if constexpr (F::kGroup == 4) {
    NVIT_VECTOR for (int64_t i = 0; i < bytes; ++i) {
      const uint32_t two = read<uint16_t>(codes + i * 2);
      out[i] = static_cast<uint8_t>((two >> 4 & 0x0f) | (two >> 8 & 0xf0));
    }
  } else {
    NVIT_VECTOR for (int64_t i = 0; i < bytes; ++i) {
      const uint32_t four = read<uint32_t>(codes + i * 4) >> 4 & 0x03030303;
      out[i] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
    }
  }
}

template <class F, Mask kind>
uint32_t compress_band(const Job& job, int unit) {
  const Band b = Band::of<F>(job, unit);
  uint8_t codes[kBandRows][kMaxGroups];
  uint32_t fault = 0;
  for (int r = 0; r < b.rows; ++r) {
    const int64_t row = b.row + r, group = (row * job.cols + b.col) / F::kGroup;
    if constexpr (kind != Mask::kNone) {
      const int skip = kind == Mask::kBits ? b.col / 8 : b.col;
      read_mask<F, kind>(job.mask + row * job.mask_stride + skip, b.groups, codes[r]);
    }
    fault |= compress_row<F, kind != Mask::kNone>(
        static_cast<const typename F::In*>(job.dense) + row * job.stride + b.col, b.groups,
        static_cast<typename F::Stored*>(job.values) + group, codes[r]);
    store_bitmask<F>(job, b, r, codes[r]);
  }
  store_meta<F>(job, b, codes);
  return fault;
}

template <class F>
uint32_t repack_band(const Job& job, int unit) {
  const Band b = Band::of<F>(job, unit);
  uint8_t codes[kBandRows][kMaxGroups];
  uint32_t fault = 0;
  load_meta<F>(job, b, codes);
  for (int r = 0; r < b.rows; ++r) {
    const int64_t row = b.row + r, group = (row * job.cols + b.col) / F::kGroup;
    fault |= repack_row<F>(static_cast<const typename F::In*>(job.dense) + row * job.stride + b.col, codes[r], b.groups,
                           static_cast<typename F::Stored*>(job.values) + group);
  }
  return fault;
}

template <class F>
uint32_t decompress_band(const Job& job, int unit) {
  const Band b = Band::of<F>(job, unit);
  uint8_t codes[kBandRows][kMaxGroups];
  uint32_t fault = 0;
  load_meta<F>(job, b, codes);
  for (int r = 0; r < b.rows; ++r) {
    const int64_t row = b.row + r, group = (row * job.cols + b.col) / F::kGroup;
    fault |= decompress_row<F>(static_cast<const typename F::Stored*>(job.values) + group, codes[r], b.groups,
                               static_cast<typename F::Out*>(job.dense) + row * job.stride + b.col);
  }
  return fault;
}

template <class F>
uint32_t run_format(Work work, Mask mask, const Job& job, int unit) {
  switch (work) {
    case Work::kRepack: return repack_band<F>(job, unit);
    case Work::kDecompress: return decompress_band<F>(job, unit);
    default: break;
  }
  switch (mask) {
    case Mask::kBits: return compress_band<F, Mask::kBits>(job, unit);
    case Mask::kBytes: return compress_band<F, Mask::kBytes>(job, unit);
    default: return compress_band<F, Mask::kNone>(job, unit);
  }
}

uint32_t run_band(Work work, Format format, Mask mask, const Job& job, int unit) {
  switch (format) {
    case Format::kHalf: return run_format<Half>(work, mask, job, unit);
    case Format::kBFloat16: return run_format<BFloat16>(work, mask, job, unit);
    case Format::kFloatToHalf: return run_format<Narrowed<ToHalf>>(work, mask, job, unit);
    case Format::kFloatToBFloat16: return run_format<Narrowed<ToBFloat16>>(work, mask, job, unit);
    case Format::kPair: return run_format<Pair>(work, mask, job, unit);
    default: return run_format<Int8>(work, mask, job, unit);
  }
}

}  // namespace NVIT_ISA
}  // namespace nvit
