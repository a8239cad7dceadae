// One image whose tokens merge: what is read, what is written, and the room to work in.
#pragma once

#include <cstdint>

namespace nvit {

struct Merging {
  const float* x;      // (tokens, width)
  const float* keys;   // (heads, tokens, dims), dims side by side
  const float* sizes;  // (tokens,); null: one each
  float* y;            // out: (tokens - r, width)
  float* total;        // out: (tokens - r,)
  int64_t* place;      // out: (tokens,)
  float* room;         // (room_floats(),)
  int32_t* into;       // room as well: which odd token each even one goes into, -1 where it stays
  int64_t tokens, width, r, prefix, heads, dims;
  int64_t stride_h, stride_n;  // of keys
};

// Always inlined: a copy that one instruction set shares with another would run where it must not.
#define NVIT_MERGING __attribute__((always_inline)) inline

NVIT_MERGING int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
NVIT_MERGING int64_t evens_of(const Merging& m) { return (m.tokens - m.prefix + 1) / 2; }
NVIT_MERGING int64_t odds_of(const Merging& m) { return (m.tokens - m.prefix) / 2; }

constexpr int kEvensAtOnce = 6, kOddsAtOnce = 16;

// A row of an even token's key, and as much for an odd one's: whole registers.
NVIT_MERGING int64_t key_floats(const Merging& m) { return round_up(m.dims, kOddsAtOnce); }

// Keys of even tokens, of odd ones, of one more, and how near each even token is to its partner.
NVIT_MERGING int64_t room_floats(const Merging& m) {
  const int64_t keys = round_up(evens_of(m), kEvensAtOnce) + round_up(odds_of(m), kOddsAtOnce) + 1;
  return keys * key_floats(m) + evens_of(m);
}

}  // namespace nvit
