// bf16 weights for the kernel for many tokens (avx512_many.h): a step is a group of four columns,
// of which a row has two kept weights.
#pragma once
#include <algorithm>
#include <cstring>

#include "avx512_many.h"

namespace cast {
namespace {

// x -> [tile][padded token] 64 columns
inline int64_t many_bytes(const Linear& p) {
  return many_padded_tokens(p) * p.num_tile_columns() * kXBytes;
}

inline void prepare_many(const Linear& p, void* workspace) {
  constexpr int64_t kRows = 16;  // of x at a time
  const int64_t padded = many_padded_tokens(p), row_bytes = p.in_features * 2;
  for (int64_t first = 0; first < padded; first += kRows)
    for (int64_t at = 0; at < p.num_tile_columns() * kXBytes; at += kXBytes)
      for (int64_t token = first; token < std::min(first + kRows, padded); ++token) {
        uint8_t* to = static_cast<uint8_t*>(workspace) + at * padded + token * kXBytes;
        const auto* from = static_cast<const uint8_t*>(p.x) + token * p.x_stride * 2 + at;
        if (token < p.num_tokens && at + kXBytes <= row_bytes) {
          std::memcpy(to, from, kXBytes);
        } else {
          const int64_t bytes = token < p.num_tokens ? row_bytes - at : 0;
          std::memcpy(to, from, bytes);
          std::memset(to + bytes, 0, kXBytes - bytes);
        }
      }
}

struct ManyBf16 {
  static constexpr int64_t kValueBytes = kTileRows * kTileKept * 2;
  static constexpr int64_t kMostTileBytes = kValueBytes + kTileRows * 8;
  static constexpr int kGroups = 1, kTileLines = kMostTileBytes / 64;
  // Not that of vdpbf16ps: with more, eight tokens have two sums each, for which registers lack.
  static constexpr int kLatency = 4;
  static int64_t row_tiles(const Linear& p) { return p.num_tile_columns(); }
  static int64_t tile_bytes(const Linear&) { return kMostTileBytes; }

  // `step` is a constant once loops are unrolled.
  struct Tiles {
    __m512i positions[2];  // register i has steps 8 i to 8 i + 7 of each row
    __m512i words[16];     // of values

    explicit Tiles(TilePair tiles) {
      const __m512i even =
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i above = _mm512_loadu_si512(tiles[0] + kValueBytes);
      const __m512i below = _mm512_loadu_si512(tiles[1] + kValueBytes);
      positions[0] = _mm512_permutex2var_epi32(above, even, below);
      positions[1] =
          _mm512_permutex2var_epi32(above, _mm512_add_epi32(even, _mm512_set1_epi32(1)), below);
#pragma GCC unroll 16
      for (int row = 0; row < kLaneRows; ++row)
        words[row] = _mm512_loadu_si512(tiles[row / kTileRows] + row % kTileRows * kTileKept * 2);
      transpose_16x16(words);
    }

    __m512i columns(int step) const {
      // A column has two bytes, so its bits are taken from one place lower. Of each 8 bytes four
      // are of one row and four of the next, whose bits lie 32 apart.
      uint64_t places = 0;
      for (int byte = 0; byte < 8; ++byte)
        places |= static_cast<uint64_t>((step % 8 * 4 + byte / 4 * 32 + byte / 2 % 2 * 2 + 63) % 64)
                  << byte * 8;
      const __m512i bits =
          _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places), positions[step / 8]);
      const __m512i bases = _mm512_set1_epi16(0x0100);
      return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(6), bases, 0xEA);  // (a & 6) | base
    }

    __m512i weights(int step) const { return words[step]; }
  };

  using Dots = __m512;
  static Dots add_dots(Dots dots, __m512i x, __m512i weights) {
    return _mm512_dpbf16_ps(dots, (__m512bh)x, (__m512bh)weights);
  }

  struct Offsets {};  // none
  static void add_offsets(Offsets&, __m512i) {}

  struct Scales {};
  template <int kGroup>
  static Scales scales(TilePair) {
    return {};
  }

  static void add_to(float* sums, Dots dots, Offsets, Scales, const float*, int) {
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), dots));
  }
};

}  // namespace
}  // namespace cast
