// Sixteen rows of 8-bit and 4-bit weights in the lanes of a register, times some tokens.
//
// The rows are those of two tiles, one below the other. For every eight columns, an octet, one
// register has a row's four kept weights in a lane of 32 bits, and another has their columns, 0 to
// 7. Eight columns of a token are broadcast, vpshufb gives each row its own four of them, and
// vpdpbusd multiplies: two instructions and a broadcast load for 64 kept weights of a token. (On
// Zen 5 a load that broadcasts 16 bytes takes a shuffle's place too and costs half as much again.)
//
// A tile has the columns of a scale group of x. After it the integer sums become float, are
// multiplied with the scales and added to sums in memory. 4-bit weights become 8-bit ones first;
// their sums are scaled after every scale group, of which a tile has 1, 2 or 4.
//
// vpdpbusd takes x unsigned, so x + 128 is stored, and 128 times the sum of a row's weights is
// subtracted again.
#pragma once
#include <cstring>

#include "avx512_common.h"
#include "avx512vnni_int4.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

constexpr int kTileOctets = kInt8TileColumns / 8;
constexpr int kLaneRows = 2 * kTileRows;

using TilePair = const uint8_t* const (&)[2];

// Register i has four 32-bit words of rows 4 i to 4 i + 3, a row's side by side -> register i has
// word i of each row.
inline void transpose_16x4(__m512i words[4]) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512i above = _mm512_permutex2var_epi32(words[0], first, words[1]);
  const __m512i below = _mm512_permutex2var_epi32(words[2], first, words[3]);
  const __m512i last_above = _mm512_permutex2var_epi32(words[0], last, words[1]);
  const __m512i last_below = _mm512_permutex2var_epi32(words[2], last, words[3]);
  words[0] = _mm512_shuffle_i64x2(above, below, 0x44);
  words[1] = _mm512_shuffle_i64x2(above, below, 0xee);
  words[2] = _mm512_shuffle_i64x2(last_above, last_below, 0x44);
  words[3] = _mm512_shuffle_i64x2(last_above, last_below, 0xee);
}

// Two tiles, taken apart in registers; so `octet` is a constant once loops are unrolled.
template <Weights kWeights>
struct LaneTiles {
  static constexpr bool kIsInt4 = kWeights == Weights::kInt4;
  __m512i positions[4];             // register i has octets 4 i to 4 i + 3 of each row
  __m512i words[kIsInt4 ? 8 : 16];  // of values

  explicit LaneTiles(TilePair tiles) {
    constexpr int64_t kPositionsAt = kIsInt4 ? kInt4PositionsAt : kTileRows * kInt8TileKept;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      positions[i] = _mm512_loadu_si512(tiles[i / 2] + kPositionsAt + i % 2 * 64);
    transpose_16x4(positions);
    if constexpr (kIsInt4) {  // a row's 32 bytes are two times four words
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* rows = tiles[i / 2] + i % 2 * 4 * kInt4RowBytes;
        const __m512i two = _mm512_loadu_si512(rows), more = _mm512_loadu_si512(rows + 64);
        words[i] = _mm512_shuffle_i64x2(two, more, 0x88);
        words[4 + i] = _mm512_shuffle_i64x2(two, more, 0xdd);
      }
      transpose_16x4(words);
      transpose_16x4(words + 4);
    } else {
#pragma GCC unroll 16
      for (int row = 0; row < kLaneRows; ++row)
        words[row] = _mm512_loadu_si512(tiles[row / kTileRows] + row % kTileRows * kInt8TileKept);
      transpose_16x16(words);
    }
  }

  __m512i columns(int octet) const {
    // Of each 8 bytes four are of one row and four of the next, whose bits lie 32 apart.
    const __m512i shifts = _mm512_set1_epi64(0x2624222006040200 + octet % 4 * 0x0808080808080808);
    const __m512i bits = _mm512_multishift_epi64_epi8(shifts, positions[octet / 4]);
    const __m512i bases = _mm512_set1_epi32(0x04040000);
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(3), bases, 0xEA);  // (a & 3) | base
  }

  // Of 4 bits: word i of the one four and of the other has octets 4 i and 4 i + 1 in the lower
  // halves of its bytes, and the next two in the upper ones.
  __m512i weights(int octet) const {
    if constexpr (!kIsInt4) return words[octet];
    const __m512i matrix = _mm512_set1_epi64(octet % 4 < 2 ? kInt4Lower : kInt4Upper);
    return _mm512_gf2p8affine_epi64_epi8(words[octet % 2 * 4 + octet / 4], matrix, 0);
  }
};

// The same in memory.
struct KeptTiles {
  alignas(64) uint8_t columns[kTileOctets][64], weights[kTileOctets][64];
  alignas(64) int32_t offsets[kMostScaleGroups][kLaneRows];
  alignas(64) float scales[kMostScaleGroups][kLaneRows];  // of 4-bit weights
};

// A lane's sum of products. GCC 12 copies an __m512i to and fro in loops of vpdpbusd.
using Dots = __v16si;

inline Dots add_dots(Dots dots, const uint8_t* eight, __m512i columns, __m512i weights) {
  double x;
  std::memcpy(&x, eight, 8);
  const __m512i of_rows = _mm512_shuffle_epi8(_mm512_castpd_si512(_mm512_set1_pd(x)), columns);
  return (Dots)_mm512_dpbusd_epi32((__m512i)dots, of_rows, weights);
}

inline __m512i add_offsets(__m512i offsets, __m512i weights) {
  return _mm512_dpbusd_epi32(offsets, _mm512_set1_epi8(kZero), weights);
}

template <int kGroups, int kGroup>
inline __m512 int4_lane_scales(TilePair tiles) {
  return _mm512_shuffle_f32x4(int4_group_scales<kGroups, kGroup>(tiles[0]),
                              int4_group_scales<kGroups, kGroup>(tiles[1]), 0x44);
}

inline void add_scaled(Dots dots, __m512i offsets, __m512 scales, float* sums) {
  const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)dots, offsets));
  _mm512_store_ps(sums, _mm512_fmadd_ps(exact, scales, _mm512_load_ps(sums)));
}

// f<0>() to f<kGroups - 1>()
template <int kGroups, typename Function>
inline void for_each_group(const Function& f) {
  f.template operator()<0>();
  if constexpr (kGroups > 1) f.template operator()<1>();
  if constexpr (kGroups > 2) f.template operator()<2>(), f.template operator()<3>();
}

template <Weights kWeights, int kGroups>
inline void keep(TilePair tiles, KeptTiles& kept) {
  constexpr int kGroupOctets = kTileOctets / kGroups;
  const LaneTiles<kWeights> lanes(tiles);
  for_each_group<kGroups>([&]<int kGroup>() {
    __m512i offsets = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int octet = kGroup * kGroupOctets; octet < (kGroup + 1) * kGroupOctets; ++octet) {
      const __m512i weights = lanes.weights(octet);
      offsets = add_offsets(offsets, weights);
      _mm512_store_si512(kept.weights[octet], weights);
      _mm512_store_si512(kept.columns[octet], lanes.columns(octet));
    }
    _mm512_store_si512(kept.offsets[kGroup], offsets);
    if constexpr (kWeights == Weights::kInt4)
      _mm512_store_ps(kept.scales[kGroup], int4_lane_scales<kGroups, kGroup>(tiles));
  });
}

// Adds the rows times kTokens tokens to sums, [token][row]. x: [token] 128 integers; scales:
// [token].
template <Weights kWeights, int kGroups, int kTokens>
inline void multiply_kept(const KeptTiles& kept, const uint8_t* x, const float* scales,
                          float* sums) {
  constexpr int kGroupOctets = kTileOctets / kGroups;
  for (int group = 0; group < kGroups; ++group) {
    Dots dots[kTokens] = {};
    for (int octet = group * kGroupOctets; octet < (group + 1) * kGroupOctets; ++octet) {
      const __m512i columns = _mm512_load_si512(kept.columns[octet]);
      const __m512i weights = _mm512_load_si512(kept.weights[octet]);
#pragma GCC unroll 16
      for (int token = 0; token < kTokens; ++token)
        dots[token] =
            add_dots(dots[token], x + token * kInt8TileColumns + octet * 8, columns, weights);
    }
    const __m512i offsets = _mm512_load_si512(kept.offsets[group]);
#pragma GCC unroll 16
    for (int token = 0; token < kTokens; ++token) {
      __m512 scale = _mm512_set1_ps(scales[token]);
      if constexpr (kWeights == Weights::kInt4)
        scale = _mm512_mul_ps(scale, _mm512_load_ps(kept.scales[group]));
      add_scaled(dots[token], offsets, scale, sums + token * kLaneRows);
    }
  }
}

// The same, of tiles that are not kept, since no other tokens need them.
template <Weights kWeights, int kGroups, int kTokens>
inline void multiply_at_once(TilePair tiles, const uint8_t* x, const float* scales, float* sums) {
  constexpr int kGroupOctets = kTileOctets / kGroups;
  // vpdpbusd takes four cycles, so fewer sums would wait for themselves.
  constexpr int kParts = kTokens < 8 ? 2 : 1;
  const LaneTiles<kWeights> lanes(tiles);
  for_each_group<kGroups>([&]<int kGroup>() {
    Dots dots[kParts][kTokens] = {};
    __m512i offsets = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int octet = kGroup * kGroupOctets; octet < (kGroup + 1) * kGroupOctets; ++octet) {
      const __m512i columns = lanes.columns(octet), weights = lanes.weights(octet);
      offsets = add_offsets(offsets, weights);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        Dots& sum = dots[octet % kParts][token];
        sum = add_dots(sum, x + token * kInt8TileColumns + octet * 8, columns, weights);
      }
    }
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      if constexpr (kParts == 2) dots[0][token] += dots[1][token];
      __m512 scale = _mm512_set1_ps(scales[token]);
      if constexpr (kWeights == Weights::kInt4)
        scale = _mm512_mul_ps(scale, int4_lane_scales<kGroups, kGroup>(tiles));
      add_scaled(dots[0][token], offsets, scale, sums + token * kLaneRows);
    }
  });
}

}  // namespace
}  // namespace cast
