// 8-bit and 4-bit weights for the kernel for many tokens (avx512_many.h): a step is an octet, eight
// columns, of which a row has four kept weights.
//
// A tile has the columns of a scale group of x. After it the integer sums become float, are
// multiplied with the scales and added. 4-bit weights become 8-bit ones first; their sums are
// scaled after every scale group, of which a tile has 1, 2 or 4.
//
// vpdpbusd takes x unsigned, so x + 128 is stored, and 128 times the sum of a row's weights is
// subtracted again.
#pragma once
#include <algorithm>
#include <cstring>

#include "avx512_many.h"
#include "avx512vnni_int4.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

// x -> [tile][padded token] 128 integers, then the scales, [tile][padded token].
inline int64_t int8_many_bytes(const Linear& p) {
  return many_padded_tokens(p) * p.num_int8_tile_columns() * (kInt8TileColumns + 4);
}

inline const float* int8_many_scales(const Linear& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  const int64_t padded_k = p.num_int8_tile_columns() * kInt8TileColumns;
  return reinterpret_cast<const float*>(integers + many_padded_tokens(p) * padded_k);
}

inline void prepare_int8_many(const Linear& p, void* workspace) {
  constexpr int64_t kRows = 16;  // of x at a time
  const int64_t tiles = p.num_int8_tile_columns(), size = element_bytes(p.dtype);
  const int64_t padded = many_padded_tokens(p);
  uint8_t* integers = static_cast<uint8_t*>(workspace);
  float* scales = const_cast<float*>(int8_many_scales(p, workspace));
  for (int64_t first = 0; first < padded; first += kRows)
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t token = first; token < std::min(first + kRows, padded); ++token) {
        uint8_t* to = integers + (tile * padded + token) * kInt8TileColumns;
        float& scale = scales[tile * padded + token];
        if (token >= p.num_tokens) {
          std::memset(to, kZero, kInt8TileColumns);
          scale = 0;
          continue;
        }
        // So many rows at once are more than a CPU prefetches by itself.
        const int64_t next = token * p.x_stride + (tile + 1) * kInt8TileColumns;
        for (int64_t byte = 0; byte < kInt8TileColumns * size; byte += 64)
          _mm_prefetch(static_cast<const char*>(p.x) + next * size + byte, _MM_HINT_T0);
        scale = quantize(p, token, tile, to);
      }
}

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

// kScaleGroups: of a tile of 4-bit weights.
template <Weights kWeights, int kScaleGroups = 1>
struct ManyInt8 {
  static constexpr bool kIsInt4 = kWeights == Weights::kInt4;
  static constexpr int kGroups = kScaleGroups, kTileLines = kIsInt4 ? 7 : 10;
  static constexpr int kLatency = 4;  // of vpdpbusd, cycles
  static constexpr int64_t kMostTileBytes = kInt8TileBytes;
  static int64_t row_tiles(const Linear& p) { return p.num_int8_tile_columns(); }
  static int64_t tile_bytes(const Linear& p) {
    return kIsInt4 ? p.int4_tile_bytes() : kInt8TileBytes;
  }

  // `step` is a constant once loops are unrolled.
  struct Tiles {
    __m512i positions[4];             // register i has steps 4 i to 4 i + 3 of each row
    __m512i words[kIsInt4 ? 8 : 16];  // of values

    explicit Tiles(TilePair tiles) {
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

    __m512i columns(int step) const {
      // Of each 8 bytes four are of one row and four of the next, whose bits lie 32 apart.
      const __m512i shifts = _mm512_set1_epi64(0x2624222006040200 + step % 4 * 0x0808080808080808);
      const __m512i bits = _mm512_multishift_epi64_epi8(shifts, positions[step / 4]);
      const __m512i bases = _mm512_set1_epi32(0x04040000);
      return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(3), bases, 0xEA);  // (a & 3) | base
    }

    // Of 4 bits: word i of the one four and of the other has steps 4 i and 4 i + 1 in the lower
    // halves of its bytes, and the next two in the upper ones.
    __m512i weights(int step) const {
      if constexpr (!kIsInt4) return words[step];
      const __m512i matrix = _mm512_set1_epi64(step % 4 < 2 ? kInt4Lower : kInt4Upper);
      return _mm512_gf2p8affine_epi64_epi8(words[step % 2 * 4 + step / 4], matrix, 0);
    }
  };

  using Dots = __v16si;  // GCC 12 copies an __m512i to and fro in loops of vpdpbusd
  static Dots add_dots(Dots dots, __m512i x, __m512i weights) {
    return (Dots)_mm512_dpbusd_epi32((__m512i)dots, x, weights);
  }

  using Offsets = __m512i;
  static void add_offsets(Offsets& offsets, __m512i weights) {
    offsets = _mm512_dpbusd_epi32(offsets, _mm512_set1_epi8(kZero), weights);
  }

  using Scales = __m512;  // of 4-bit weights' rows
  template <int kGroup>
  static Scales scales(TilePair tiles) {
    if constexpr (!kIsInt4) return _mm512_setzero_ps();
    return _mm512_shuffle_f32x4(int4_group_scales<kGroups, kGroup>(tiles[0]),
                                int4_group_scales<kGroups, kGroup>(tiles[1]), 0x44);
  }

  static void add_to(float* sums, Dots dots, Offsets offsets, Scales of_rows,
                     const float* of_tokens, int token) {
    __m512 scale = _mm512_set1_ps(of_tokens[token]);
    if constexpr (kIsInt4) scale = _mm512_mul_ps(scale, of_rows);
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)dots, offsets));
    _mm512_store_ps(sums, _mm512_fmadd_ps(exact, scale, _mm512_load_ps(sums)));
  }
};

template <Weights kWeights, int kScaleGroups>
void run_int8_many(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  const ManyX x = {static_cast<const uint8_t*>(workspace), int8_many_scales(p, workspace)};
  run_many<ManyInt8<kWeights, kScaleGroups>>(p, x, begin, end);
}

}  // namespace
}  // namespace cast
