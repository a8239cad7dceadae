// A plan kept between calls as bytes, so that a call for a whole model reads one table instead of checking each matrix
// and allocating its outputs anew. Whoever holds the table holds the tensors that its pointers lead into.
#pragma once

#include <cstring>
#include <type_traits>

#include "prepare.h"

namespace nvit {

struct StoredJob {
  Job job;
  Format format;
  Mask mask;
};
static_assert(std::is_trivially_copyable_v<StoredJob>);

// The table, uint8 (jobs, sizeof(StoredJob)) on the CPU.
inline Tensor store(const char* op, const Plan& plan, const Tensors& dense, const Tensors& others) {
  for (size_t i = 0; i < dense.size(); ++i) {
    const bool in_place = plan.jobs[i].dense == dense[i].const_data_ptr();
    require(in_place, op, i, "lies so that it would have to be copied; a plan reads matrices where they are.");
  }
  for (size_t i = 0; i < others.size(); ++i) {
    const void* read = plan.jobs[i].mask ? static_cast<const void*>(plan.jobs[i].mask) : plan.jobs[i].meta;
    require(read == others[i].const_data_ptr(), op, i,
            "has a mask or metadata that would have to be copied; a plan reads them where they are.");
  }
  const std::vector<int64_t> size{static_cast<int64_t>(plan.jobs.size()), sizeof(StoredJob)};
  Tensor table = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()),
                                      ScalarType::Byte);
  uint8_t* at = static_cast<uint8_t*>(table.data_ptr());
  for (size_t i = 0; i < plan.jobs.size(); ++i, at += sizeof(StoredJob)) {
    const StoredJob stored{plan.jobs[i], plan.formats[i], plan.masks[i]};
    std::memcpy(at, &stored, sizeof(stored));
  }
  return table;
}

inline Plan restore(const char* op, const Tensor& table) {
  require(table.is_cpu() && table.scalar_type() == ScalarType::Byte && table.dim() == 2 && table.is_contiguous() &&
              table.size(1) == static_cast<int64_t>(sizeof(StoredJob)),
          op, 0, "comes with a table that no plan of this build wrote.");
  const size_t count = table.size(0);
  const uint8_t* at = static_cast<const uint8_t*>(table.const_data_ptr());
  Plan plan;
  plan.jobs.reserve(count);
  plan.formats.reserve(count);
  plan.masks.reserve(count);
  for (size_t i = 0; i < count; ++i, at += sizeof(StoredJob)) {
    StoredJob stored;
    std::memcpy(&stored, at, sizeof(stored));
    plan.jobs.push_back(stored.job);
    plan.formats.push_back(stored.format);
    plan.masks.push_back(stored.mask);
  }
  return plan;
}

inline std::tuple<Tensor, Tensors, Tensors, Tensors> store_compress(const Tensors& dense, const Tensors& mask,
                                                                    std::optional<ScalarType> dtype, int64_t align) {
  auto [plan, values, meta, bitmask] = plan_compress(dense, mask, dtype, align);
  return {store("compress_2to4", plan, dense, mask), values, meta, bitmask};
}

inline std::tuple<Tensor, Tensors> store_repack(const Tensors& dense, const Tensors& meta,
                                                std::optional<ScalarType> dtype, int64_t align) {
  auto [plan, values] = plan_repack(dense, meta, dtype, align);
  return {store("repack_2to4", plan, dense, meta), values};
}

}  // namespace nvit
