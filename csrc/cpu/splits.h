// The inner loop of the channel-order search: what each split of eight channels into two groups of four keeps. Compiled
// once per instruction set, like band.h.
#pragma once

#include <cstdint>

#include "isa.h"

namespace nvit {
namespace NVIT_ISA {

constexpr int kLanes = 16, kPairs = 28, kFours = 70;

// Numbers of the pairs {a, b} and {c, d} of every four channels: the 35 fours with channel 0 in lexical order, each
// followed by the four channels it leaves.
struct Fours {
  int first[kFours], second[kFours];
  constexpr Fours() : first(), second() {
    int pair[8][8] = {}, n = 0, at = 0;
    for (int a = 0; a < 8; ++a) {
      for (int b = a + 1; b < 8; ++b) pair[a][b] = n++;
    }
    for (int b = 1; b < 8; ++b) {
      for (int c = b + 1; c < 8; ++c) {
        for (int d = c + 1; d < 8; ++d) {
          int left[4] = {}, count = 0;
          for (int i = 1; i < 8; ++i) {
            if (i != b && i != c && i != d) left[count++] = i;
          }
          first[at] = pair[0][b];
          second[at++] = pair[c][d];
          first[at] = pair[left[0]][left[1]];
          second[at++] = pair[left[2]][left[3]];
        }
      }
    }
  }
};
constexpr Fours kAll;

// Sixteen rows at once, in as many registers as the instruction set needs for them.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// `magnitudes` is (channels, rows); `scores` gets 35 sums.
void split_scores(const float* magnitudes, int64_t rows, const int64_t* octet, float* scores) {
  Lanes kept[kFours] = {};
  for (int64_t r = 0; r < rows; r += kLanes) {
    Lanes channel[8] = {}, sum[kPairs], most[kPairs];
    const int64_t n = rows - r < kLanes ? rows - r : kLanes;
    for (int c = 0; c < 8; ++c) {
      const float* from = magnitudes + octet[c] * rows + r;
      if (n == kLanes) {
        __builtin_memcpy(&channel[c], from, sizeof(Lanes));
      } else {
        __builtin_memcpy(&channel[c], from, n * sizeof(float));
      }
    }
    for (int a = 0, p = 0; a < 8; ++a) {
      for (int b = a + 1; b < 8; ++b, ++p) {
        sum[p] = channel[a] + channel[b];
        most[p] = channel[a] > channel[b] ? channel[a] : channel[b];
      }
    }
    for (int f = 0; f < kFours; ++f) {
      const int ab = kAll.first[f], cd = kAll.second[f];
      const Lanes together = sum[ab] > sum[cd] ? sum[ab] : sum[cd], one_each = most[ab] + most[cd];
      kept[f] += together > one_each ? together : one_each;
    }
  }
  for (int s = 0; s < kFours / 2; ++s) {
    const Lanes both = kept[2 * s] + kept[2 * s + 1];
    float total = 0;
    for (int l = 0; l < kLanes; ++l) total += both[l];
    scores[s] = total;
  }
}

}  // namespace NVIT_ISA
}  // namespace nvit
