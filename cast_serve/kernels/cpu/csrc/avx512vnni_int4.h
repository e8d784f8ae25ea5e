// 4-bit weights -> 8-bit ones in registers, and their scales as floats.
//
// The 8-bit weights are 16 times the 4-bit ones: the lower four bits of a byte are shifted up, the
// upper four stay, and neither needs its sign extended. Scales are divided by 16 instead, exactly.
//
// A row's 32 bytes are read twice into a register and half of it is shifted, which costs two
// instructions. Then byte 16 i + 4 a + d is the kept weight 16 a + 4 i + d: each 16 bytes have four
// of every scale group of 32 columns, in order. So a row's four scales, one for each quarter of a
// tile, are broadcast and are the scales of all sixteen sums of vpdpbusd.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>

#include "linear24.h"

namespace cast {
namespace {

// Which kept weight is at a byte of the register.
constexpr int int4_kept(int byte) { return byte / 4 % 4 * 16 + byte / 16 * 4 + byte % 4; }

inline __m512i int4_weights(const uint8_t* pairs) {
  const __m512i twice =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)));
  const __m512i shifted = _mm512_sllv_epi64(twice, _mm512_set_epi64(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(0xF0)));
}

// The same, kept weights in order: the register's 32-bit words are transposed as 4 x 4.
inline __m512i int4_weights_in_order(const uint8_t* pairs) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, int4_weights(pairs));
}

// Scales, as words, divided by 16. `numbers`, their places among the words, are in odd words.
inline __m512 int4_scales(__m512i words, __m512i numbers) {
  // A bf16 number is the upper half of a float.
  const __m512i floats = _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, numbers, words);
  return _mm512_mul_ps(_mm512_castsi512_ps(floats), _mm512_set1_ps(1.0f / 16));
}

// Reads a tile's scales, however many there are.
struct Int4Scales {
  __mmask32 inside;
  explicit Int4Scales(int64_t groups)
      : inside(static_cast<__mmask32>((uint64_t{1} << kTileRows * groups) - 1)) {}
  __m512 operator()(const uint8_t* tile, __m512i numbers) const {
    return int4_scales(_mm512_maskz_loadu_epi16(inside, tile + kInt4ScalesAt), numbers);
  }
};

// The numbers of the scales of four rows from `row` on, of each quarter of their columns.
inline __m512i int4_row_scales(int64_t groups, int64_t row) {
  alignas(64) uint16_t numbers[32];
  for (int64_t j = 0; j < 32; ++j)
    numbers[j] = static_cast<uint16_t>((row + j / 8) * groups + j / 2 % 4 * groups / 4);
  return _mm512_load_si512(numbers);
}

// The scales of the eight rows of a tile, of scale group kGroup and, if there is one, the next.
template <int kGroups, int kGroup>
inline __m512 int4_group_scales(const uint8_t* tile) {
  static constexpr std::array<uint16_t, 32> kNumbers = [] {
    std::array<uint16_t, 32> numbers = {};
    for (int j = 0; j < 32; ++j)
      numbers[j] = static_cast<uint16_t>(j / 2 % 8 * kGroups + kGroup + j / 16);
    return numbers;
  }();
  // No load with a mask: it would wait for the cache line of the next tile.
  __m512i words;
  if constexpr (kGroups == 1)
    words = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(tile + kInt4ScalesAt)));
  else if constexpr (kGroups == 2)
    words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(tile + kInt4ScalesAt)));
  else
    words = _mm512_loadu_si512(tile + kInt4ScalesAt);
  return int4_scales(words, _mm512_loadu_si512(kNumbers.data()));
}

// All of a tile's scales -> [scale group][8 rows], scale groups `stride` floats apart.
template <int kGroups>
inline void read_int4_scales(const uint8_t* tile, float* to, int64_t stride) {
  const auto two_groups = [&]<int kGroup>() {
    if constexpr (kGroup < kGroups) {
      const __m512 both = int4_group_scales<kGroups, kGroup>(tile);
      _mm256_store_ps(to + kGroup * stride, _mm512_castps512_ps256(both));
      if constexpr (kGroup + 1 < kGroups)
        _mm256_store_ps(to + (kGroup + 1) * stride, _mm512_extractf32x8_ps(both, 1));
    }
  };
  two_groups.template operator()<0>();
  two_groups.template operator()<2>();
}

}  // namespace
}  // namespace cast
