// Which copies of the CPU's kernels exist, and which one this machine runs.
#pragma once

#include <cstdint>

#include "../codec/job.h"
#include "merging.h"

// g++ on x86-64 compiles a file for a wider instruction set by pragma; elsewhere the baseline is all there is. The pragma
// leaves the compiler's own macros as they were, so every file says the bytes of a register, NVIT_REGISTER, itself.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NVIT_HAS_ISA_COPIES 1
#else
#define NVIT_HAS_ISA_COPIES 0
#endif

namespace nvit {

struct Kernels {
  uint32_t (*run_band)(Work, Format, Mask, const Job&, int unit);
  void (*split_scores)(const float* magnitudes, int64_t rows, const int64_t* octet, float* scores);
  void (*merge_image)(const Merging&);
};

namespace baseline {
Kernels kernels();
}
#if NVIT_HAS_ISA_COPIES
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
#endif

inline Kernels fastest_kernels() {
#if NVIT_HAS_ISA_COPIES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    return avx512::kernels();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels();
  }
#endif
  return baseline::kernels();
}

inline int band_units(const Job& job) {
  return (job.rows + kBandRows - 1) / kBandRows * ((job.cols + kBandCols - 1) / kBandCols);
}

}  // namespace nvit
