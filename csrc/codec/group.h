// Four elements, two kept: which two, and how their positions are written. Plain integer code for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NVIT_INLINE __host__ __device__ __forceinline__
#else
#define NVIT_INLINE inline __attribute__((always_inline))
#endif

namespace nvit {

// A group is one 64-bit word of four 16-bit lanes, element 0 lowest. A flag is the top bit of a lane.
constexpr uint64_t kFlags = 0x8000800080008000ull;

// Flags of the two largest lanes; the lower index wins a tie. Each lane holds a magnitude of at most 0x7fff, so
// `(a | 0x8000) - b` never borrows from its neighbour and its top bit says a >= b: two subtractions compare six pairs.
NVIT_INLINE uint64_t two_largest(uint64_t magnitudes) {
  const uint64_t raised = magnitudes | kFlags;
  const uint64_t after = magnitudes >> 16 | magnitudes << 48;   // lane i holds element i + 1, lane 3 element 0
  const uint64_t across = magnitudes >> 32 | magnitudes << 32;  // lane i holds element i + 2
  // Element 3 against element 0 must win outright: one less for lane 3.
  const uint64_t beats_after = (raised - after - (1ull << 48)) & kFlags;
  const uint64_t beats_before = ~(beats_after << 16 | beats_after >> 48) & kFlags;
  const uint64_t low = (raised - across) & 0x80008000ull;
  const uint64_t beats_across = low | (~low & 0x80008000ull) << 32;
  // Kept: beats at least two of the other three.
  return (beats_after & beats_before) | ((beats_after | beats_before) & beats_across);
}

// Flags of the lanes that are not zero; each lane at most 0x7fff.
NVIT_INLINE uint64_t nonzero(uint64_t magnitudes) { return (magnitudes + 0x7fff7fff7fff7fffull) & kFlags; }

// All bits of the flagged lanes.
NVIT_INLINE uint64_t whole_lanes(uint64_t flags) { return flags | (flags - (flags >> 15)); }

// The flags of a 4-bit number, element 0 lowest.
NVIT_INLINE uint64_t to_flags(uint64_t bits) {
  return (bits & 1) << 15 | (bits & 2) << 30 | (bits & 4) << 45 | (bits & 8) << 60;
}

// The metadata nibble, `i0 | i1 << 2` with i0 < i1, for the flags of the nonzero elements that stay (two at most). With
// fewer than two, the free place goes where torch's conversion puts it: none 1110, e0 1000, e1 1001, e2 or e3 1110.
// No table and no variable shift of a constant: compilers turn this form into vector code.
NVIT_INLINE uint64_t nibble_of(uint64_t flags) {
  const uint64_t e0 = flags >> 15 & 1, e1 = flags >> 31 & 1, e3 = flags >> 63;
  const uint64_t bit0 = e1 & (e0 ^ 1), bit1 = (e0 | e1) ^ 1;
  const uint64_t bit2 = (e0 & e1) | bit1 | e3, bit3 = bit0 | (e1 ^ 1);
  return bit0 | bit1 << 1 | bit2 << 2 | bit3 << 3;
}

NVIT_INLINE uint64_t first_index(uint64_t nibble) { return nibble & 3; }
NVIT_INLINE uint64_t second_index(uint64_t nibble) { return nibble >> 2 & 3; }

// The two stored positions as a 4-bit number.
NVIT_INLINE uint64_t stored_bits(uint64_t nibble) {
  const uint64_t bit0 = nibble & 1, bit1 = nibble >> 1 & 1, bit2 = nibble >> 2 & 1, bit3 = nibble >> 3;
  const uint64_t e0 = (bit0 | bit1) ^ 1, e1 = bit0 | (bit2 & (bit3 ^ 1)), e2 = bit1 | (bit3 & (bit2 ^ 1));
  return e0 | e1 << 1 | e2 << 2 | (bit2 & bit3) << 3;
}

NVIT_INLINE uint64_t more_than_two(uint64_t bits) {
  return (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3 & 1) > 2;
}
NVIT_INLINE uint64_t more_than_one_of_two(uint64_t bits) { return bits >> 1 & bits & 1; }
NVIT_INLINE uint64_t is_nibble(uint64_t nibble) { return first_index(nibble) < second_index(nibble); }
NVIT_INLINE uint64_t is_pair_nibble(uint64_t nibble) { return (nibble == 4) | (nibble == 14); }

}  // namespace nvit
