// The GPU's tile code, run by the host: thread after thread within a phase, phase after phase.
#pragma once

#include "../codec/tile.h"

namespace nvit {

template <class F, Mask kind>
uint32_t emulate_compress(const Job& job, int unit) {
  const Tile tile = tile_of(job, unit);
  TileBuffer buffer;
  __builtin_memset(&buffer, 0xee, sizeof(buffer));  // what a thread forgets to write shows
  uint32_t fault = 0;
  for (int t = 0; t < kThreads; ++t) fault |= compress_thread<F, kind>(job, tile, t, buffer);
  for (int t = 0; t < kThreads; ++t) store_thread<F>(job, tile, t, buffer);
  return fault;
}

inline uint32_t emulate_tile(Work work, Format format, Mask mask, const Job& job, int unit) {
  uint32_t fault = 0;
  with_format(format, [&](auto f) {
    using F = decltype(f);
    const Tile tile = tile_of(job, unit);
    if (work == Work::kCompress) {
      fault = mask == Mask::kNone   ? emulate_compress<F, Mask::kNone>(job, unit)
              : mask == Mask::kBits ? emulate_compress<F, Mask::kBits>(job, unit)
                                    : emulate_compress<F, Mask::kBytes>(job, unit);
      return;
    }
    for (int t = 0; t < kThreads; ++t) {
      fault |= work == Work::kRepack ? repack_thread<F>(job, tile, t) : decompress_thread<F>(job, tile, t);
    }
  });
  return fault;
}

}  // namespace nvit
