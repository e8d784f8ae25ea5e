// 4-bit weights -> 8-bit ones in registers, and their scales as floats.
//
// A row's 32 bytes are read twice into a register. One instruction of GFNI, which multiplies the
// bits of each byte by a matrix, takes the lower four bits of one half's bytes and the upper four
// of the other's, and extends their signs. Then byte 16 i + 4 a + d is the kept weight 16 a + 4 i +
// d: each 16 bytes have four of every scale group of 32 columns, in order. So a row's four scales,
// one for each quarter of a tile, are broadcast and are the scales of all sixteen sums of vpdpbusd.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>

#include "linear24.h"

namespace cast {
namespace {

// Which kept weight is at a byte of the register.
constexpr int int4_kept(int byte) { return byte / 4 % 4 * 16 + byte / 16 * 4 + byte % 4; }

// The matrices of GFNI that take the lower and the upper half of a byte and extend its sign. Byte 7
// - i of a matrix names the bits whose sum, modulo 2, is bit i of the result.
constexpr int64_t kInt4Lower = 0x0102040808080808;
constexpr int64_t kInt4Upper = static_cast<int64_t>(0x1020408080808080);

inline __m512i int4_weights(const uint8_t* pairs) {
  const __m512i twice =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)));
  const __m512i matrices = _mm512_set_epi64(kInt4Upper, kInt4Upper, kInt4Upper, kInt4Upper,
                                            kInt4Lower, kInt4Lower, kInt4Lower, kInt4Lower);
  return _mm512_gf2p8affine_epi64_epi8(twice, matrices, 0);
}

// The same, kept weights in order: the register's 32-bit words are transposed as 4 x 4.
inline __m512i int4_weights_in_order(const uint8_t* pairs) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, int4_weights(pairs));
}

// kBytes of scales into a register's lowest words. No load with a mask, whatever it leaves out: it
// would wait for the cache line of the next tile.
template <int kBytes>
inline __m512i int4_scale_words(const uint8_t* from) {
  if constexpr (kBytes == 8) return _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)from));
  if constexpr (kBytes == 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
  if constexpr (kBytes == 32)
    return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  if constexpr (kBytes == 64) return _mm512_loadu_si512(from);
}

// Float j of the result is the scale in word kWord(j).
template <auto kWord>
inline __m512 int4_scales(__m512i words) {
  static constexpr std::array<uint16_t, 32> kWords = [] {
    std::array<uint16_t, 32> numbers = {};
    for (int j = 0; j < 16; ++j) numbers[2 * j + 1] = static_cast<uint16_t>(kWord(j));
    return numbers;
  }();
  // A bf16 number is the upper half of a float.
  const __m512i numbers = _mm512_loadu_si512(kWords.data());
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, numbers, words));
}

// The scales of kRows rows, which have one each, again and again.
template <int kRows>
inline __m512 int4_row_scales(const uint8_t* from) {
  return int4_scales<[](int j) { return j % kRows; }>(int4_scale_words<kRows * 2>(from));
}

// Number j of sixteen products of tokens and rows, [token][kRows], is of this token.
template <int kRows>
inline __m512i int4_token_numbers() {
  if constexpr (kRows == 8)
    return _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}

// The scales of four rows, of each quarter of their columns.
template <int kGroups>
inline __m512 int4_quarter_scales(const uint8_t* from) {
  return int4_scales<[](int j) { return j / 4 * kGroups + j % 4 * kGroups / 4; }>(
      int4_scale_words<kGroups * 8>(from));
}

// The scales of the eight rows of a tile, of scale group kGroup and, if there is one, the next.
template <int kGroups, int kGroup>
inline __m512 int4_group_scales(const uint8_t* tile) {
  return int4_scales<[](int j) { return j % 8 * kGroups + (kGroup + j / 8) % kGroups; }>(
      int4_scale_words<kGroups * 16>(tile + kInt4ScalesAt));
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
