// The CUDA kernels behind the operators that ops.cpp defines. Loaded beside a CUDA build of torch only.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../prepare.h"
#include "../stored_plan.h"
#include "kernels.cuh"

namespace nvit {
namespace {

constexpr int64_t kAlign = 16;  // loads are 16 bytes wide

void run_all(const char* op, Plan& plan, Work work, bool check, const Tensor& where) {
  const int32_t device = where.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream_handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_handle));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);

  const int64_t total = static_cast<int64_t>(plan.jobs.size());
  const Tensor faults = empty_like_device(where, {total}, ScalarType::Int);
  uint32_t* device_faults = static_cast<uint32_t*>(faults.data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(device_faults, 0, total * sizeof(uint32_t), stream));

  for_each_launch(plan, device_faults, [&](Format format, Mask mask, const JobTable& table, int blocks) {
    with_format(format, [&](auto f) { launch<decltype(f)>(work, mask, table, blocks, stream); });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });

  if (!check) return;
  std::vector<uint32_t> host(total);
  STD_CUDA_CHECK(cudaMemcpyAsync(host.data(), device_faults, total * sizeof(uint32_t), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  for (int64_t i = 0; i < total; ++i) require_no_fault(op, i, host[i]);
}

std::tuple<Tensors, Tensors, Tensors> compress(Tensors dense, Tensors mask, std::optional<ScalarType> dtype,
                                               bool check) {
  auto [plan, values, meta, bitmask] = plan_compress(dense, mask, dtype, kAlign);
  if (!dense.empty()) run_all("compress_2to4", plan, Work::kCompress, check, dense[0]);
  return {values, meta, bitmask};
}

Tensors repack(Tensors dense, Tensors meta, std::optional<ScalarType> dtype, bool check) {
  auto [plan, values] = plan_repack(dense, meta, dtype, kAlign);
  if (!dense.empty()) run_all("repack_2to4", plan, Work::kRepack, check, dense[0]);
  return values;
}

Tensors decompress(Tensors values, Tensors meta, bool check) {
  auto [plan, dense] = plan_decompress(values, meta, kAlign);
  if (!values.empty()) run_all("decompress_2to4", plan, Work::kDecompress, check, values[0]);
  return dense;
}

std::tuple<Tensor, Tensors, Tensors, Tensors> stored_compress(Tensors dense, Tensors mask,
                                                              std::optional<ScalarType> dtype) {
  return store_compress(dense, mask, dtype, kAlign);
}

std::tuple<Tensor, Tensors> stored_repack(Tensors dense, Tensors meta, std::optional<ScalarType> dtype) {
  return store_repack(dense, meta, dtype, kAlign);
}

// `where` is any tensor of the device.
template <Work work>
void replay(Tensor table, Tensor where, bool check) {
  constexpr const char* kOp = work == Work::kCompress ? "compress_2to4" : "repack_2to4";
  Plan plan = restore(kOp, table);
  if (!plan.jobs.empty()) run_all(kOp, plan, work, check, where);
}

}  // namespace
}  // namespace nvit

STABLE_TORCH_LIBRARY_IMPL(nvit, CUDA, m) {
  m.impl("compress_2to4", TORCH_BOX(&nvit::compress));
  m.impl("repack_2to4", TORCH_BOX(&nvit::repack));
  m.impl("decompress_2to4", TORCH_BOX(&nvit::decompress));
  m.impl("_plan_compress_2to4", TORCH_BOX(&nvit::stored_compress));
  m.impl("_plan_repack_2to4", TORCH_BOX(&nvit::stored_repack));
  m.impl("_replay_compress_2to4", TORCH_BOX(&nvit::replay<nvit::Work::kCompress>));
  m.impl("_replay_repack_2to4", TORCH_BOX(&nvit::replay<nvit::Work::kRepack>));
}
