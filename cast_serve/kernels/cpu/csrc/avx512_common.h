// What the AVX-512 kernels share: prefetching, masks, sums across lanes, transposes.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "linear24.h"

namespace cast {
namespace {

template <int kLines, Prefetch kPrefetch>
void prefetch(const uint8_t* bytes) {
  if constexpr (kPrefetch != Prefetch::kNone) {
    constexpr auto hint = kPrefetch == Prefetch::kT0 ? _MM_HINT_T0 : _MM_HINT_T1;
#pragma GCC unroll 16
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(bytes + line * 64), hint);
  }
}

inline __mmask8 first_of_eight(int64_t count) {
  return static_cast<__mmask8>((1 << std::clamp<int64_t>(count, 0, 8)) - 1);
}

// Lane i of the result is the sum of the lanes of sums[i].
inline __m512 sums_of_lanes(__m512 sums[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 8], 0x44),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 4], 0x88),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    sums[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[i], sums[i + 2]),
                            _mm512_unpackhi_ps(sums[i], sums[i + 2]));
  const __m512 mixed =
      _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  return _mm512_shuffle_f32x4(mixed, mixed, 0xd8);  // swaps the middle quarters
}

// out[token][row] = sums[row][token]
inline void transpose_8x8(const __m256 sums[8], __m256 out[8]) {
  __m256 twos[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    twos[i] = _mm256_unpacklo_ps(sums[i], sums[i + 1]);
    twos[i + 1] = _mm256_unpackhi_ps(sums[i], sums[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(twos[i + j], twos[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(twos[i + j], twos[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

// rows[i] becomes column i of the sixteen rows of 32-bit values.
inline void transpose_16x16(__m512i rows[16]) {
  __m512i twos[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // each quarter of a register gets one column of four rows
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    rows[to] = _mm512_unpacklo_epi64(twos[from], twos[from + 2]);
    rows[to + 1] = _mm512_unpackhi_epi64(twos[from], twos[from + 2]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i more_even = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i more_odd = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
  }
}

}  // namespace
}  // namespace cast
