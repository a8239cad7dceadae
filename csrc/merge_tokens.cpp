// Tokens merged on a CPU, image by image. Arguments are checked here once more, because a wrong one would be read out of
// bounds; the sentences users see are in nvit_kernels/ops/merge_tokens/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

namespace nvit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const auto kMergeImage = fastest_kernels().merge_image;

void expect(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("_merge_tokens: ") + what);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Tensor empty(const Tensor& x, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()), dtype);
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens(Tensor x, Tensor keys, std::optional<Tensor> sizes, int64_t r,
                                                int64_t prefix) {
  expect(x.dim() == 3 && x.scalar_type() == ScalarType::Float, "x is not float32 (batch, tokens, width).");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), left = tokens - r;
  expect(keys.dim() == 4 && keys.scalar_type() == ScalarType::Float && keys.size(0) == batch && keys.size(1) > 0 &&
             keys.size(2) == tokens,
         "keys are not float32 (batch, heads, tokens, dims).");
  if (sizes) {
    expect(sizes->dim() == 2 && sizes->scalar_type() == ScalarType::Float && sizes->size(0) == batch &&
               sizes->size(1) == tokens,
           "sizes are not float32 (batch, tokens).");
    if (!sizes->is_contiguous()) sizes = torch::stable::contiguous(*sizes);
  }
  expect(0 <= prefix && 0 <= r && r <= std::max<int64_t>(0, tokens - prefix) / 2, "so many tokens cannot merge.");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  if (keys.stride(3) != 1) keys = torch::stable::contiguous(keys);

  Tensor y = empty(x, {batch, left, width}, ScalarType::Float), total = empty(x, {batch, left}, ScalarType::Float);
  Tensor place = empty(x, {batch, tokens}, ScalarType::Long);
  const Merging first{
      .x = floats(x),
      .keys = floats(keys),
      .sizes = sizes ? floats(*sizes) : nullptr,
      .y = static_cast<float*>(y.data_ptr()),
      .total = static_cast<float*>(total.data_ptr()),
      .place = static_cast<int64_t*>(place.data_ptr()),
      .room = nullptr,
      .into = nullptr,
      .tokens = tokens,
      .width = width,
      .r = r,
      .prefix = std::min(prefix, tokens),
      .heads = keys.size(1),
      .dims = keys.size(3),
      .stride_h = keys.stride(1),
      .stride_n = keys.stride(2),
  };
  const int64_t stride_b = keys.stride(0);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const auto room = std::make_unique_for_overwrite<float[]>(room_floats(first));
    const auto into = std::make_unique_for_overwrite<int32_t[]>(evens_of(first));
    for (int64_t image = begin; image < end; ++image) {
      Merging m = first;
      m.x += image * tokens * width;
      m.keys += image * stride_b;
      m.sizes = m.sizes ? m.sizes + image * tokens : nullptr;
      m.y += image * left * width;
      m.total += image * left;
      m.place += image * tokens;
      m.room = room.get();
      m.into = into.get();
      kMergeImage(m);
    }
  });
  return {y, total, place};
}

}  // namespace
}  // namespace nvit

STABLE_TORCH_LIBRARY_FRAGMENT(nvit, m) {
  m.def("_merge_tokens(Tensor x, Tensor keys, Tensor? sizes, int r, int prefix) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nvit, CPU, m) { m.impl("_merge_tokens", TORCH_BOX(&nvit::merge_tokens)); }
