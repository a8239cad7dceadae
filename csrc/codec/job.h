// One matrix to compress, repack or decompress, as plain pointers: the same for every device.
#pragma once

#include <cstdint>

namespace nvit {

enum class Work : int { kCompress, kRepack, kDecompress };
enum class Format : int { kHalf, kBFloat16, kFloatToHalf, kFloatToBFloat16, kPair, kInt8 };
enum class Mask : int { kNone, kBits, kBytes };  // kBits: as the bitmask we write; kBytes: one bool an element

struct Job {
  void* dense;
  const uint8_t* mask;
  void* values;
  void* meta;
  uint8_t* bitmask;
  int64_t stride;       // elements from one row of `dense` to the next
  int64_t mask_stride;  // bytes
  int32_t rows, cols;
  int32_t first_unit;  // of the launch: bands on the CPU, tiles on a GPU
};

// A band is one core's unit of work; the last one of an 8-bit matrix may have 16 rows.
constexpr int kBandRows = 32, kBandCols = 1024;

}  // namespace nvit
