// Where a metadata nibble lies in memory: the order in which sparse tensor cores of compute capability 8 read it.
#pragma once

#include "group.h"

namespace nvit {

// Metadata is cut into blocks of 256 nibbles (128 bytes). A block covers kBlockRows rows and kBlockGroups groups;
// blocks follow each other down the rows first, then across the groups. `word16` is the index of four neighbouring
// nibbles.

// int16 metadata (16-bit values, and pairs of 32-bit values): index bits, low to high, g0 g1 | r3 g2 r4 r0 r1 r2.
struct Words16 {
  static constexpr int kBlockRows = 32, kBlockGroups = 8;
  static NVIT_INLINE uint32_t in_block(uint32_t row, uint32_t quad) {
    return (row >> 3 & 1) | (quad & 1) << 1 | (row >> 4 & 1) << 2 | (row & 7) << 3;
  }
};

// int32 metadata (8-bit values): g0 g1 g2 | r3 g3 r0 r1 r2, so a word holds two neighbouring quads.
struct Words32 {
  static constexpr int kBlockRows = 16, kBlockGroups = 16;
  static NVIT_INLINE uint32_t in_block(uint32_t row, uint32_t quad) {
    return (quad & 1) | (row >> 3 & 1) << 1 | (quad >> 1 & 1) << 2 | (row & 7) << 3;
  }
};

// `quad` counts groups in fours along a row.
template <class Layout>
NVIT_INLINE uint64_t word16(uint32_t row, uint32_t quad, uint32_t rows) {
  const uint32_t across = quad / (Layout::kBlockGroups / 4), down = row / Layout::kBlockRows;
  return (uint64_t{across} * (rows / Layout::kBlockRows) + down) * 64 + Layout::in_block(row, quad);
}

}  // namespace nvit
