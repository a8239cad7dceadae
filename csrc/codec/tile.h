// A tile of 32 rows by 256 columns worked on by 256 threads: each phase as what one thread does. A GPU runs a phase in
// all threads and then waits for them; the host runs the same code thread after thread, which tests every index without
// a GPU.
#pragma once

#include "format.h"
#include "job.h"

#if defined(__CUDACC__)
#define NVIT_UNROLL _Pragma("unroll")
#else
#define NVIT_UNROLL
#endif

namespace nvit {

constexpr int kTileCols = 256, kThreads = 256;
constexpr int kChunk = 8;  // elements a thread takes at once: 16 bytes of 16-bit values
constexpr int kChunksPerRow = kTileCols / kChunk, kChunksPerThread = kBandRows * kChunksPerRow / kThreads;

// What a tile gathers before it writes: metadata in its final order, and the bitmask.
struct TileBuffer {
  alignas(16) uint16_t meta[kBandRows * kTileCols / 8];  // four nibbles a word, sized for pairs (the most)
  alignas(16) uint8_t bitmask[kBandRows * kTileCols / 8];
};

inline int tile_count(const Job& job) {
  return (job.rows + kBandRows - 1) / kBandRows * ((job.cols + kTileCols - 1) / kTileCols);
}

struct Tile {
  int row, col, rows, cols;
};
NVIT_INLINE Tile tile_of(const Job& job, int unit) {
  const int down = (job.rows + kBandRows - 1) / kBandRows;
  const int row = unit % down * kBandRows, col = unit / down * kTileCols;
  return {row, col, job.rows - row < kBandRows ? job.rows - row : kBandRows,
          job.cols - col < kTileCols ? job.cols - col : kTileCols};
}

// Eight elements in one or two wide loads.
template <class T>
struct alignas(sizeof(T) * kChunk < 16 ? sizeof(T) * kChunk : 16) Chunk {
  T element[kChunk];
};
template <class T, int n>
struct alignas(sizeof(T) * n) Few {
  T element[n];
};

// Where in the tile's buffer a quad of nibbles goes: as in memory, in a matrix as high as the tile.
template <class Layout>
NVIT_INLINE uint32_t word_in_tile(uint32_t row, uint32_t quad) {
  return word16<Layout>(row, quad, kBandRows);
}

// A chunk makes half a metadata word of groups of four (two nibbles), or one of pairs (four nibbles).
template <class F>
constexpr int kChunkGroups = kChunk / F::kGroup;

template <class F>
NVIT_INLINE uint32_t chunk_mask(Mask kind, const Job& job, int row, int col) {
  if (kind == Mask::kNone) return 0;
  const uint8_t* mask = job.mask + row * job.mask_stride;
  if (kind == Mask::kBits) return mask[col / 8];
  const uint64_t m = read<uint64_t>(mask + col) & 0x0101010101010101ull;
  return uint32_t((m | m >> 7 | m >> 14 | m >> 21 | m >> 28 | m >> 35 | m >> 42 | m >> 49) & 255);
}

// Calls `body(number, row in tile, chunk in row, row, column)` for each of a thread's chunks that is not off the edge.
template <class Body>
NVIT_INLINE void each_chunk(const Tile& tile, int thread, const Body& body) {
  NVIT_UNROLL for (int i = 0; i < kChunksPerThread; ++i) {
    const int id = i * kThreads + thread, r = id / kChunksPerRow, c = id % kChunksPerRow;
    if (r < tile.rows && c * kChunk < tile.cols) body(i, r, c, tile.row + r, tile.col + c * kChunk);
  }
}

// All of a thread's loads before any of its stores, so that they are under way together.
template <class F>
struct Loaded {
  Chunk<typename F::In> chunk[kChunksPerThread];
  NVIT_INLINE Loaded(const Job& job, const Tile& tile, int thread) {
    each_chunk(tile, thread, [&](int i, int, int, int row, int col) {
      chunk[i] = read<Chunk<typename F::In>>(static_cast<const typename F::In*>(job.dense) + row * job.stride + col);
    });
  }
};

// Phase 1: choose, store the values, leave metadata and bitmask in the buffer.
template <class F, Mask kind>
NVIT_INLINE uint32_t compress_thread(const Job& job, const Tile& tile, int thread, TileBuffer& buffer) {
  uint32_t fault = 0;
  const Loaded<F> in(job, tile, thread);
  each_chunk(tile, thread, [&](int i, int r, int c, int row, int col) {
    const uint32_t bits = chunk_mask<F>(kind, job, row, col);
    Few<typename F::Stored, kChunkGroups<F>> values;
    uint32_t nibbles = 0, stored = 0;
    NVIT_UNROLL for (int g = 0; g < kChunkGroups<F>; ++g) {
      const uint32_t part = bits >> g * F::kGroup & ((1u << F::kGroup) - 1);
      const Packed p = Pack<F, kind != Mask::kNone>::group(in.chunk[i].element + g * F::kGroup, part);
      values.element[g] = static_cast<typename F::Stored>(p.values);
      nibbles |= (p.code & 15) << g * 4;
      stored |= p.code >> 4 << g * F::kGroup;
      fault |= p.fault;
    }
    write(static_cast<typename F::Stored*>(job.values) + (int64_t{row} * job.cols + col) / F::kGroup, values);
    buffer.bitmask[r * kChunksPerRow + c] = static_cast<uint8_t>(stored);
    if constexpr (F::kGroup == 2) {
      buffer.meta[word_in_tile<typename F::Layout>(r, c)] = static_cast<uint16_t>(nibbles);
    } else {
      reinterpret_cast<uint8_t*>(buffer.meta + word_in_tile<typename F::Layout>(r, c / 2))[c % 2] =
          static_cast<uint8_t>(nibbles);
    }
  });
  return fault;
}

// Phase 2: the buffer to memory, neighbouring threads to neighbouring words.
template <class F>
NVIT_INLINE void store_thread(const Job& job, const Tile& tile, int thread, const TileBuffer& buffer) {
  using Layout = typename F::Layout;
  // Per column of blocks, a tile's metadata is one run of 32-bit words, here and in memory.
  constexpr int kRun = kBandRows * Layout::kBlockGroups / 8;
  const int run = tile.rows * Layout::kBlockGroups / 8, runs = tile.cols / F::kGroup / Layout::kBlockGroups;
  const int first = tile.col / F::kGroup / Layout::kBlockGroups;
  constexpr int kWords = kBandRows * kTileCols / F::kGroup / 8, kBitWords = kBandRows * kChunksPerRow / 4;
  static_assert(kWords % kThreads == 0 && kBitWords == kThreads, "every thread writes as often");
  NVIT_UNROLL for (int n = 0; n < kWords / kThreads; ++n) {
    const int i = n * kThreads + thread, across = i / kRun, at = i % kRun;
    if (across < runs && at < run) {
      const int64_t to = (int64_t{first + across} * job.rows + tile.row) * Layout::kBlockGroups / 8 + at;
      write(static_cast<uint32_t*>(job.meta) + to, read<uint32_t>(buffer.meta + i * 2));
    }
  }
  const int r = thread / (kChunksPerRow / 4), c = thread % (kChunksPerRow / 4);
  if (r < tile.rows && c * 32 < tile.cols) {
    write(job.bitmask + (int64_t{tile.row + r} * job.cols + tile.col) / 8 + c * 4,
          read<uint32_t>(buffer.bitmask + thread * 4));
  }
}

// The nibbles of a chunk, from metadata in its final order.
template <class F>
NVIT_INLINE uint32_t chunk_nibbles(const Job& job, int row, int col) {
  const int group = col / F::kGroup;
  const uint16_t* word = static_cast<const uint16_t*>(job.meta) + word16<typename F::Layout>(row, group / 4, job.rows);
  return F::kGroup == 2 ? *word : reinterpret_cast<const uint8_t*>(word)[group / 2 % 2];
}

// One phase each, nothing shared.
template <class F>
NVIT_INLINE uint32_t repack_thread(const Job& job, const Tile& tile, int thread) {
  uint32_t fault = 0;
  const Loaded<F> in(job, tile, thread);
  each_chunk(tile, thread, [&](int i, int, int, int row, int col) {
    const uint32_t nibbles = chunk_nibbles<F>(job, row, col);
    Few<typename F::Stored, kChunkGroups<F>> values;
    NVIT_UNROLL for (int g = 0; g < kChunkGroups<F>; ++g) {
      const Packed p = repack_group<F>(in.chunk[i].element + g * F::kGroup, nibbles >> g * 4 & 15);
      values.element[g] = static_cast<typename F::Stored>(p.values);
      fault |= p.fault;
    }
    write(static_cast<typename F::Stored*>(job.values) + (int64_t{row} * job.cols + col) / F::kGroup, values);
  });
  return fault;
}

template <class F>
NVIT_INLINE uint32_t decompress_thread(const Job& job, const Tile& tile, int thread) {
  uint32_t fault = 0;
  each_chunk(tile, thread, [&](int, int, int, int row, int col) {
    const auto values = read<Few<typename F::Stored, kChunkGroups<F>>>(static_cast<const typename F::Stored*>(job.values) +
                                                                  (int64_t{row} * job.cols + col) / F::kGroup);
    const uint32_t nibbles = chunk_nibbles<F>(job, row, col);
    Chunk<typename F::Out> out;
    NVIT_UNROLL for (int g = 0; g < kChunkGroups<F>; ++g) {
      const uint64_t dense = unpack_group<F>(values.element[g], nibbles >> g * 4 & 15);
      NVIT_UNROLL for (int e = 0; e < F::kGroup; ++e) {
        out.element[g * F::kGroup + e] = static_cast<typename F::Out>(dense >> e * F::kOutBits);
      }
      fault |= nibble_fault<F>(nibbles >> g * 4 & 15);
    }
    write(static_cast<typename F::Out*>(job.dense) + row * job.stride + col, out);
  });
  return fault;
}

// Calls `body(F{})` with the format as a type.
template <class Body>
void with_format(Format format, const Body& body) {
  switch (format) {
    case Format::kHalf: return body(Half{});
    case Format::kBFloat16: return body(BFloat16{});
    case Format::kFloatToHalf: return body(Narrowed<ToHalf>{});
    case Format::kFloatToBFloat16: return body(Narrowed<ToBFloat16>{});
    case Format::kPair: return body(Pair{});
    default: return body(Int8{});
  }
}

}  // namespace nvit
