// Which copies of the band code exist, and which one this machine runs.
#pragma once

#include <cstdint>

#include "../codec/job.h"

// g++ on x86-64 compiles a file for a wider instruction set by pragma; elsewhere the baseline is all there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NVIT_HAS_ISA_COPIES 1
#else
#define NVIT_HAS_ISA_COPIES 0
#endif

namespace nvit {

using RunBand = uint32_t (*)(Work, Format, Mask, const Job&, int);

namespace baseline {
uint32_t run_band(Work, Format, Mask, const Job&, int);
}
#if NVIT_HAS_ISA_COPIES
namespace avx2 {
uint32_t run_band(Work, Format, Mask, const Job&, int);
}
namespace avx512 {
uint32_t run_band(Work, Format, Mask, const Job&, int);
}
#endif

inline RunBand fastest_band() {
#if NVIT_HAS_ISA_COPIES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    return avx512::run_band;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) {
    return avx2::run_band;
  }
#endif
  return baseline::run_band;
}

inline int band_units(const Job& job) {
  return (job.rows + kBandRows - 1) / kBandRows * ((job.cols + kBandCols - 1) / kBandCols);
}

}  // namespace nvit
