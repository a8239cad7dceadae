// One launch for up to 56 matrices of one format: each block finds its matrix, then runs the tile code of codec/tile.h.
#pragma once

#include "../codec/tile.h"
#include "../launches.h"

namespace nvit {

// The job whose units hold this block: the last with first_unit <= block.
__device__ __forceinline__ int find_job(const JobTable& table, int block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.job[middle].first_unit <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ void report(const JobTable& table, int job, uint32_t fault) {
  if (fault) atomicOr(table.faults + job, fault);
}

template <class F, Mask kind>
__global__ void __launch_bounds__(kThreads) compress_kernel(const __grid_constant__ JobTable table) {
  __shared__ TileBuffer buffer;
  const int i = find_job(table, blockIdx.x);
  const Job& job = table.job[i];
  const Tile tile = tile_of(job, blockIdx.x - job.first_unit);
  report(table, i, compress_thread<F, kind>(job, tile, threadIdx.x, buffer));
  __syncthreads();
  store_thread<F>(job, tile, threadIdx.x, buffer);
}

template <class F, bool kRepack>
__global__ void __launch_bounds__(kThreads) move_kernel(const __grid_constant__ JobTable table) {
  const int i = find_job(table, blockIdx.x);
  const Job& job = table.job[i];
  const Tile tile = tile_of(job, blockIdx.x - job.first_unit);
  if constexpr (kRepack) {
    report(table, i, repack_thread<F>(job, tile, threadIdx.x));
  } else {
    report(table, i, decompress_thread<F>(job, tile, threadIdx.x));
  }
}

template <class F>
void launch(Work work, Mask mask, const JobTable& table, int blocks, cudaStream_t stream) {
  if (work == Work::kRepack) {
    move_kernel<F, true><<<blocks, kThreads, 0, stream>>>(table);
  } else if (work == Work::kDecompress) {
    if constexpr (sizeof(typename F::In) == sizeof(typename F::Out)) {
      move_kernel<F, false><<<blocks, kThreads, 0, stream>>>(table);
    }
  } else if (mask == Mask::kNone) {
    compress_kernel<F, Mask::kNone><<<blocks, kThreads, 0, stream>>>(table);
  } else if (mask == Mask::kBits) {
    compress_kernel<F, Mask::kBits><<<blocks, kThreads, 0, stream>>>(table);
  } else {
    compress_kernel<F, Mask::kBytes><<<blocks, kThreads, 0, stream>>>(table);
  }
}

}  // namespace nvit
