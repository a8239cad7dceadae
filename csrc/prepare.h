// From tensors to jobs: what every device's operators share. Sizes are checked here once more, because a wrong one
// would be read out of bounds; the sentences users see are in nvit_kernels/sparse24/compress.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "codec/format.h"
#include "codec/job.h"

namespace nvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What differs between formats in the shape of things.
struct Shape {
  int row_multiple, col_multiple, group, stored;
  int groups_per_meta;
  ScalarType values, meta;
};

inline Shape shape_of(Format f) {
  switch (f) {
    case Format::kHalf:
    case Format::kFloatToHalf: return {32, 64, 4, 2, 4, ScalarType::Half, ScalarType::Short};
    case Format::kBFloat16:
    case Format::kFloatToBFloat16: return {32, 64, 4, 2, 4, ScalarType::BFloat16, ScalarType::Short};
    case Format::kPair: return {32, 32, 2, 1, 4, ScalarType::Float, ScalarType::Short};
    default: return {16, 128, 4, 2, 8, ScalarType::Char, ScalarType::Int};
  }
}

// Arrives in Python as a RuntimeError whose one line sparse24.py raises again as a ValueError.
inline void require(bool ok, const char* op, size_t i, const char* what) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": matrix " + std::to_string(i) + " " + what);
}

inline Format format_of(const char* op, size_t i, ScalarType in, std::optional<ScalarType> out) {
  const ScalarType to = out.value_or(in);
  if (in == ScalarType::Half && to == in) return Format::kHalf;
  if (in == ScalarType::BFloat16 && to == in) return Format::kBFloat16;
  if (in == ScalarType::Char && to == in) return Format::kInt8;
  if (in == ScalarType::Float && to == in) return Format::kPair;
  if (in == ScalarType::Float && to == ScalarType::Half) return Format::kFloatToHalf;
  if (in == ScalarType::Float && to == ScalarType::BFloat16) return Format::kFloatToBFloat16;
  require(false, op, i, "has a dtype, or asks for one, that 2:4 sparsity has no form for.");
  return Format::kHalf;
}

inline void require_matrix(const char* op, size_t i, const Tensor& t, const Shape& s) {
  require(t.dim() == 2, op, i, "is not a matrix.");
  require(t.size(0) > 0 && t.size(1) > 0 && t.size(0) % s.row_multiple == 0 && t.size(1) % s.col_multiple == 0, op, i,
          "has a shape that is no multiple of what its dtype needs.");
  require(t.size(0) < (1 << 24) && t.size(1) < (1 << 24), op, i, "is too large.");
}

inline void require_like(const char* op, size_t i, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols,
                         const Tensor& device_of) {
  require(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == cols &&
              t.is_cpu() == device_of.is_cpu() && t.get_device_index() == device_of.get_device_index(),
          op, i, "and what belongs to it differ in shape, dtype or device.");
}

// Rows of neighbouring elements that start at a multiple of `align` bytes; a copy where they do not.
inline Tensor row_major(const Tensor& t, int64_t itemsize, int64_t align) {
  const bool starts = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % align == 0;
  if (t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) * itemsize % align == 0 && starts) return t;
  return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

inline int64_t bytes(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::Bool: return 1;
    default: return 2;
  }
}

// One call's work: jobs in order, with everything their pointers need kept alive.
struct Plan {
  std::vector<Job> jobs;
  std::vector<Format> formats;
  std::vector<Mask> masks;
  Tensors keep_alive;
};

inline Tensor empty_like_device(const Tensor& t, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()), dtype);
}

// `align` is 1 on the CPU and 16 where loads are 16 bytes wide.
inline std::tuple<Plan, Tensors, Tensors, Tensors> plan_compress(const Tensors& dense, const Tensors& mask,
                                                                 std::optional<ScalarType> dtype, int64_t align) {
  constexpr const char* kOp = "compress_2to4";
  require(mask.empty() || mask.size() == dense.size(), kOp, mask.size(), "and the list of masks differ in length.");
  Plan plan;
  Tensors values, meta, bitmask;
  for (size_t i = 0; i < dense.size(); ++i) {
    const Format format = format_of(kOp, i, dense[i].scalar_type(), dtype);
    const Shape s = shape_of(format);
    require_matrix(kOp, i, dense[i], s);
    const int64_t rows = dense[i].size(0), cols = dense[i].size(1);
    const Tensor in = row_major(dense[i], bytes(dense[i].scalar_type()), align);
    values.push_back(empty_like_device(in, {rows, cols / s.group * s.stored}, s.values));
    meta.push_back(empty_like_device(in, {rows, cols / s.group / s.groups_per_meta}, s.meta));
    bitmask.push_back(empty_like_device(in, {rows, cols / 8}, ScalarType::Byte));
    Job job{in.data_ptr(), nullptr, values.back().data_ptr(), meta.back().data_ptr(),
            static_cast<uint8_t*>(bitmask.back().data_ptr()), in.stride(0), 0, static_cast<int32_t>(rows),
            static_cast<int32_t>(cols), 0};
    Mask kind = Mask::kNone;
    if (!mask.empty()) {
      const bool packed = mask[i].scalar_type() == ScalarType::Byte;
      require_like(kOp, i, mask[i], packed ? ScalarType::Byte : ScalarType::Bool, rows, packed ? cols / 8 : cols, in);
      const Tensor m = row_major(mask[i], 1, align == 1 || packed ? 1 : 8);  // a packed one is read byte by byte
      job.mask = static_cast<const uint8_t*>(m.const_data_ptr());
      job.mask_stride = m.stride(0);
      kind = packed ? Mask::kBits : Mask::kBytes;
      plan.keep_alive.push_back(m);
    }
    plan.keep_alive.push_back(in);
    plan.jobs.push_back(job);
    plan.formats.push_back(format);
    plan.masks.push_back(kind);
  }
  return {std::move(plan), std::move(values), std::move(meta), std::move(bitmask)};
}

inline std::tuple<Plan, Tensors> plan_repack(const Tensors& dense, const Tensors& meta, std::optional<ScalarType> dtype,
                                             int64_t align) {
  constexpr const char* kOp = "repack_2to4";
  require(meta.size() == dense.size(), kOp, meta.size(), "and the list of metadata differ in length.");
  Plan plan;
  Tensors values;
  for (size_t i = 0; i < dense.size(); ++i) {
    const Format format = format_of(kOp, i, dense[i].scalar_type(), dtype);
    const Shape s = shape_of(format);
    require_matrix(kOp, i, dense[i], s);
    const int64_t rows = dense[i].size(0), cols = dense[i].size(1);
    const Tensor in = row_major(dense[i], bytes(dense[i].scalar_type()), align);
    require_like(kOp, i, meta[i], s.meta, rows, cols / s.group / s.groups_per_meta, in);
    const Tensor m = torch::stable::contiguous(meta[i]);
    values.push_back(empty_like_device(in, {rows, cols / s.group * s.stored}, s.values));
    plan.jobs.push_back({in.data_ptr(), nullptr, values.back().data_ptr(), m.data_ptr(), nullptr, in.stride(0), 0,
                         static_cast<int32_t>(rows), static_cast<int32_t>(cols), 0});
    plan.formats.push_back(format);
    plan.masks.push_back(Mask::kNone);
    plan.keep_alive.insert(plan.keep_alive.end(), {in, m});
  }
  return {std::move(plan), std::move(values)};
}

inline std::tuple<Plan, Tensors> plan_decompress(const Tensors& values, const Tensors& meta, int64_t align) {
  constexpr const char* kOp = "decompress_2to4";
  require(meta.size() == values.size(), kOp, meta.size(), "and the list of metadata differ in length.");
  Plan plan;
  Tensors dense;
  for (size_t i = 0; i < values.size(); ++i) {
    const Format format = format_of(kOp, i, values[i].scalar_type(), std::nullopt);
    const Shape s = shape_of(format);
    require(values[i].dim() == 2, kOp, i, "is not a matrix.");
    const int64_t rows = values[i].size(0), cols = values[i].size(1) / s.stored * s.group;
    const Tensor in = row_major(torch::stable::contiguous(values[i]), bytes(s.values), align);
    require_like(kOp, i, meta[i], s.meta, rows, cols / s.group / s.groups_per_meta, in);
    const Tensor m = torch::stable::contiguous(meta[i]);
    dense.push_back(empty_like_device(in, {rows, cols}, s.values));
    require_matrix(kOp, i, dense.back(), s);
    plan.jobs.push_back({dense.back().data_ptr(), nullptr, in.data_ptr(), m.data_ptr(), nullptr, cols, 0,
                         static_cast<int32_t>(rows), static_cast<int32_t>(cols), 0});
    plan.formats.push_back(format);
    plan.masks.push_back(Mask::kNone);
    plan.keep_alive.insert(plan.keep_alive.end(), {in, m});
  }
  return {std::move(plan), std::move(dense)};
}

inline void require_no_fault(const char* op, size_t i, uint32_t fault) {
  require(!(fault & kNaN), op, i, "holds NaN, which has no place among magnitudes. Find the step that made it.");
  require(!(fault & kMask), op, i,
          "has a mask that is not 2:4: at most 2 of each 4 neighbours may stay (float32: 1 of 2).");
  require(!(fault & kMeta), op, i, "has metadata that is not 2:4: it is damaged, or of another layout.");
}

}  // namespace nvit
