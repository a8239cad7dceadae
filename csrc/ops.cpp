// Operator definitions, and the CPU's kernels for them. Importing nvit_kernels._C registers both.
#include <Python.h>

#include <algorithm>
#include <atomic>

#include "cpu/emulate.h"
#include "cpu/isa.h"
#include "launches.h"
#include "prepare.h"
#include "stored_plan.h"

namespace nvit {
namespace {

const Kernels kKernels = fastest_kernels();

using Run = uint32_t (*)(Work, Format, Mask, const Job&, int);

// All units of all jobs as one parallel loop, so that a model of small matrices keeps every core busy.
void run_all(const char* op, Plan& plan, Work work, Run run, int (*units)(const Job&), bool check) {
  std::vector<int64_t> first{0};
  for (const Job& job : plan.jobs) first.push_back(first.back() + units(job));
  std::vector<std::atomic<uint32_t>> faults(plan.jobs.size());
  torch::stable::parallel_for(0, first.back(), 4, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (unit >= first[i + 1]) ++i;
      const uint32_t fault = run(work, plan.formats[i], plan.masks[i], plan.jobs[i], static_cast<int>(unit - first[i]));
      if (fault) faults[i].fetch_or(fault, std::memory_order_relaxed);
    }
  });
  for (size_t i = 0; check && i < faults.size(); ++i) require_no_fault(op, i, faults[i].load());
}

template <bool kTiles>
void run_all(const char* op, Plan& plan, Work work, bool check) {
  run_all(op, plan, work, kTiles ? emulate_tile : kKernels.run_band, kTiles ? tile_count : band_units, check);
}

constexpr int64_t kAlign = 1;

template <bool kTiles>
std::tuple<Tensors, Tensors, Tensors> compress(Tensors dense, Tensors mask, std::optional<ScalarType> dtype,
                                               bool check) {
  auto [plan, values, meta, bitmask] = plan_compress(dense, mask, dtype, kAlign);
  run_all<kTiles>("compress_2to4", plan, Work::kCompress, check);
  return {values, meta, bitmask};
}

template <bool kTiles>
Tensors repack(Tensors dense, Tensors meta, std::optional<ScalarType> dtype, bool check) {
  auto [plan, values] = plan_repack(dense, meta, dtype, kAlign);
  run_all<kTiles>("repack_2to4", plan, Work::kRepack, check);
  return values;
}

template <bool kTiles>
Tensors decompress(Tensors values, Tensors meta, bool check) {
  auto [plan, dense] = plan_decompress(values, meta, kAlign);
  run_all<kTiles>("decompress_2to4", plan, Work::kDecompress, check);
  return dense;
}

std::tuple<Tensor, Tensors, Tensors, Tensors> stored_compress(Tensors dense, Tensors mask,
                                                              std::optional<ScalarType> dtype) {
  return store_compress(dense, mask, dtype, kAlign);
}

std::tuple<Tensor, Tensors> stored_repack(Tensors dense, Tensors meta, std::optional<ScalarType> dtype) {
  return store_repack(dense, meta, dtype, kAlign);
}

// `where` is any tensor of the device; only the dispatcher looks at it.
template <Work work>
void replay(Tensor table, Tensor where, bool check) {
  constexpr const char* kOp = work == Work::kCompress ? "compress_2to4" : "repack_2to4";
  Plan plan = restore(kOp, table);
  run_all<false>(kOp, plan, work, check);
}

// A replay as a GPU's host does it, its launches left out; how many there would be. To the compiler the empty assembly
// reads the table, so that filling it is not left out as well.
int64_t unlaunched(Tensor table, Tensor where, bool check) {
  const Plan plan = restore("_unlaunched_2to4", table);
  Tensor faults = empty_like_device(where, {static_cast<int64_t>(plan.jobs.size())}, ScalarType::Int);
  return for_each_launch(plan, static_cast<uint32_t*>(faults.data_ptr()),
                         [](Format, Mask, const JobTable& table, int) { asm volatile("" : : "r"(&table) : "memory"); });
}

// What each of the 35 splits of each octet of channels keeps, for the channel-order search.
Tensor split_scores(Tensor magnitudes, Tensor octets) {
  constexpr const char* kOp = "_split_scores";
  require(magnitudes.scalar_type() == ScalarType::Float && magnitudes.dim() == 2 && magnitudes.is_contiguous(), kOp, 0,
          "is not a contiguous float32 matrix.");
  const bool eights = octets.dim() == 2 && octets.size(1) == 8 && octets.is_contiguous();
  require(octets.scalar_type() == ScalarType::Long && eights, kOp, 1,
          "is not a contiguous int64 matrix of eight columns.");
  const int64_t count = octets.size(0), rows = magnitudes.size(1);
  const int64_t* octet = static_cast<const int64_t*>(octets.const_data_ptr());
  for (int64_t i = 0; i < count * 8; ++i) {
    require(octet[i] >= 0 && octet[i] < magnitudes.size(0), kOp, 1, "names a channel that does not exist.");
  }
  Tensor scores = empty_like_device(magnitudes, {count, 35}, ScalarType::Float);
  float* out = static_cast<float*>(scores.data_ptr());
  const float* in = static_cast<const float*>(magnitudes.const_data_ptr());
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kKernels.split_scores(in, rows, octet + i * 8, out + i * 35);
  });
  return scores;
}

}  // namespace
}  // namespace nvit

// The `_tiles` operators run the GPU's tile code on the CPU, for tests.
STABLE_TORCH_LIBRARY_FRAGMENT(nvit, m) {
  m.def(
      "compress_2to4(Tensor[] dense, Tensor[] mask, ScalarType? dtype, bool check) -> (Tensor[], Tensor[], Tensor[])");
  m.def("repack_2to4(Tensor[] dense, Tensor[] meta, ScalarType? dtype, bool check) -> Tensor[]");
  m.def("decompress_2to4(Tensor[] values, Tensor[] meta, bool check) -> Tensor[]");
  m.def(
      "_plan_compress_2to4(Tensor[] dense, Tensor[] mask, ScalarType? dtype)"
      " -> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def("_plan_repack_2to4(Tensor[] dense, Tensor[] meta, ScalarType? dtype) -> (Tensor, Tensor[])");
  m.def("_replay_compress_2to4(Tensor table, Tensor where, bool check) -> ()");
  m.def("_replay_repack_2to4(Tensor table, Tensor where, bool check) -> ()");
  m.def("_unlaunched_2to4(Tensor table, Tensor where, bool check) -> int");
  m.def("_split_scores(Tensor magnitudes, Tensor octets) -> Tensor");
  m.def(
      "_compress_2to4_tiles(Tensor[] dense, Tensor[] mask, ScalarType? dtype, bool check)"
      " -> (Tensor[], Tensor[], Tensor[])");
  m.def("_repack_2to4_tiles(Tensor[] dense, Tensor[] meta, ScalarType? dtype, bool check) -> Tensor[]");
  m.def("_decompress_2to4_tiles(Tensor[] values, Tensor[] meta, bool check) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(nvit, CPU, m) {
  m.impl("compress_2to4", TORCH_BOX(&nvit::compress<false>));
  m.impl("repack_2to4", TORCH_BOX(&nvit::repack<false>));
  m.impl("decompress_2to4", TORCH_BOX(&nvit::decompress<false>));
  m.impl("_plan_compress_2to4", TORCH_BOX(&nvit::stored_compress));
  m.impl("_plan_repack_2to4", TORCH_BOX(&nvit::stored_repack));
  m.impl("_replay_compress_2to4", TORCH_BOX(&nvit::replay<nvit::Work::kCompress>));
  m.impl("_replay_repack_2to4", TORCH_BOX(&nvit::replay<nvit::Work::kRepack>));
  m.impl("_unlaunched_2to4", TORCH_BOX(&nvit::unlaunched));
  m.impl("_split_scores", TORCH_BOX(&nvit::split_scores));
  m.impl("_compress_2to4_tiles", TORCH_BOX(&nvit::compress<true>));
  m.impl("_repack_2to4_tiles", TORCH_BOX(&nvit::repack<true>));
  m.impl("_decompress_2to4_tiles", TORCH_BOX(&nvit::decompress<true>));
}

// An empty module: importing it is what loads the library.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
