// Alike tokens of an image merged, on one core: nvit_kernels/ops/merge_tokens/reference.py in one pass. Compiled once
// per instruction set, like band.h.
#pragma once

#include "merging.h"

namespace nvit {
namespace NVIT_ISA {

// One register: g++ keeps tiles of wider vectors in memory. A tile is as many rows as there are registers for.
constexpr int kWide = NVIT_REGISTER / sizeof(float), kRows = kWide > 4 ? 6 : 3;
constexpr int kParts = kOddsAtOnce / kWide;
static_assert(kEvensAtOnce % kRows == 0);

typedef float Wide __attribute__((vector_size(kWide * sizeof(float))));
typedef int32_t Numbers __attribute__((vector_size(kWide * sizeof(int32_t))));

constexpr float kNobody = -2;  // less than any cosine: how near a token is whose likenesses are all NaN

// A token's key summed over heads, at length 1, with zeros behind its dims.
inline void mean_key(const Merging& m, int64_t token, float* __restrict key) {
  const float* from = m.keys + token * m.stride_n;
  const int64_t floats = key_floats(m);
  for (int64_t c = 0; c < m.dims; ++c) key[c] = from[c];
  for (int64_t c = m.dims; c < floats; ++c) key[c] = 0;
  for (int64_t h = 1; h < m.heads; ++h) {
    const float* head = from + h * m.stride_h;
    for (int64_t c = 0; c < m.dims; ++c) key[c] += head[c];
  }
  Wide part, squares = {};
  for (int64_t c = 0; c < floats; c += kWide) {
    __builtin_memcpy(&part, key + c, sizeof(Wide));
    squares += part * part;
  }
  float length = 0;
  for (int l = 0; l < kWide; ++l) length += squares[l];
  length = __builtin_sqrtf(length);
  length = length < 1e-12f ? 1e-12f : length;
  for (int64_t c = 0; c < floats; ++c) key[c] /= length;
}

// Keys of even tokens, row by row; zeros behind them fill the last tile.
inline void pack_evens(const Merging& m, float* evens) {
  const int64_t count = evens_of(m), floats = key_floats(m);
  for (int64_t i = 0; i < count; ++i) mean_key(m, m.prefix + 2 * i, evens + i * floats);
  __builtin_memset(evens + count * floats, 0, (round_up(count, kEvensAtOnce) - count) * floats * sizeof(float));
}

// Keys of odd tokens, sixteen side by side, dim by dim. Those that are not there are NaN, which is nobody's nearest.
inline void pack_odds(const Merging& m, float* __restrict odds, float* __restrict key) {
  const int64_t count = odds_of(m);
  for (int64_t j = 0; j < round_up(count, kOddsAtOnce); ++j) {
    if (j < count) mean_key(m, m.prefix + 1 + 2 * j, key);
    float* to = odds + j / kOddsAtOnce * kOddsAtOnce * m.dims + j % kOddsAtOnce;
    for (int64_t c = 0; c < m.dims; ++c) to[c * kOddsAtOnce] = j < count ? key[c] : __builtin_nanf("");
  }
}

// The most alike odd token that some even ones have met so far, for each place among sixteen.
struct Nearest {
  Wide most[kRows][kParts];
  Numbers block[kRows][kParts];
};

// Sums of all pairs run over dims in one order, so that equal keys are equally alike.
inline void meet(const float* __restrict evens, int64_t floats, const float* __restrict odds, int64_t dims,
                 int32_t block, Nearest& nearest) {
  Wide alike[kRows][kParts] = {};
  for (int64_t c = 0; c < dims; ++c) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      Wide column;
      __builtin_memcpy(&column, odds + c * kOddsAtOnce + p * kWide, sizeof(Wide));
#pragma GCC unroll 6
      for (int k = 0; k < kRows; ++k) alike[k][p] += column * evens[k * floats + c];
    }
  }
  for (int k = 0; k < kRows; ++k) {
    for (int p = 0; p < kParts; ++p) {
      const auto nearer = alike[k][p] > nearest.most[k][p];
      nearest.block[k][p] = nearer ? Numbers{} + block : nearest.block[k][p];
      nearest.most[k][p] = nearer ? alike[k][p] : nearest.most[k][p];
    }
  }
}

// Of every even token the most alike odd one, of equals the earlier, and how alike they are.
inline void match(const Merging& m, const float* evens, const float* odds, float* nearness) {
  const int64_t count = evens_of(m), floats = key_floats(m);
  const int32_t blocks = static_cast<int32_t>(round_up(odds_of(m), kOddsAtOnce) / kOddsAtOnce);
  for (int64_t first = 0; first < count; first += kRows) {
    Nearest nearest = {};
    for (auto& row : nearest.most) {
      for (auto& part : row) part += kNobody;
    }
    for (int32_t block = 0; block < blocks; ++block) {
      meet(evens + first * floats, floats, odds + block * kOddsAtOnce * m.dims, m.dims, block, nearest);
    }
    for (int64_t k = 0; k < kRows && first + k < count; ++k) {
      float best = kNobody;
      int32_t partner = 0;
      for (int32_t l = 0; l < kOddsAtOnce; ++l) {
        const float most = nearest.most[k][l / kWide][l % kWide];
        const int32_t odd = nearest.block[k][l / kWide][l % kWide] * kOddsAtOnce + l;
        if (most > best || (most == best && most > kNobody && odd < partner)) {
          best = most;
          partner = odd;
        }
      }
      nearness[first + k] = best;
      m.into[first + k] = partner;
    }
  }
}

// Marks even tokens that stay. A rank is how many are nearer, or as near and earlier.
inline void choose(const Merging& m, const float* nearness) {
  const int64_t count = evens_of(m);
  for (int64_t i = 0; i < count; ++i) {
    const float mine = nearness[i];
    int32_t rank = 0;
    for (int64_t j = 0; j < i; ++j) rank += nearness[j] >= mine;
    for (int64_t j = i + 1; j < count; ++j) rank += nearness[j] > mine;
    if (rank >= m.r) m.into[i] = -1;
  }
}

// Tokens `first` to `end` of the input stay, one behind another.
inline void keep(const Merging& m, int64_t first, int64_t end, int64_t gone) {
  const int64_t to = first - gone;
  if (end <= first) return;
  __builtin_memcpy(m.y + to * m.width, m.x + first * m.width, (end - first) * m.width * sizeof(float));
  for (int64_t n = first; n < end; ++n) {
    m.place[n] = n - gone;
    m.total[n - gone] = m.sizes ? m.sizes[n] : 1;
  }
}

inline void keep_all(const Merging& m, int64_t evens) {
  int64_t first = 0, gone = 0;
  for (int64_t i = 0; i < evens; ++i) {
    if (m.into[i] < 0) continue;
    const int64_t source = m.prefix + 2 * i;
    keep(m, first, source, gone++);
    first = source + 1;
  }
  keep(m, first, m.tokens, gone);
}

// A mean as a step from the partner towards each source: tokens that nothing merges into stay as they are.
inline void merge_sources(const Merging& m, int64_t evens) {
  for (int64_t i = 0; i < evens; ++i) {
    if (m.into[i] < 0) continue;
    const int64_t source = m.prefix + 2 * i, partner = m.prefix + 1 + 2 * m.into[i];
    m.place[source] = m.place[partner];
    m.total[m.place[source]] += m.sizes ? m.sizes[source] : 1;
  }
  for (int64_t i = 0; i < evens; ++i) {
    if (m.into[i] < 0) continue;
    const int64_t source = m.prefix + 2 * i, partner = m.prefix + 1 + 2 * m.into[i];
    const float share = (m.sizes ? m.sizes[source] : 1) / m.total[m.place[source]];
    const float *from = m.x + source * m.width, *old = m.x + partner * m.width;
    float* __restrict mean = m.y + m.place[source] * m.width;
    for (int64_t c = 0; c < m.width; ++c) mean[c] += (from[c] - old[c]) * share;
  }
}

void merge_image(const Merging& m) {
  const int64_t count = m.r ? evens_of(m) : 0, floats = key_floats(m);
  if (count) {
    float* evens = m.room;
    float* odds = evens + round_up(count, kEvensAtOnce) * floats;
    float* key = odds + round_up(odds_of(m), kOddsAtOnce) * floats;
    float* nearness = key + floats;
    pack_evens(m, evens);
    pack_odds(m, odds, key);
    match(m, evens, odds, nearness);
    choose(m, nearness);
  }
  keep_all(m, count);
  merge_sources(m, count);
}

}  // namespace NVIT_ISA
}  // namespace nvit
