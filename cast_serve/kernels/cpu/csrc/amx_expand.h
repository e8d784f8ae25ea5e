// Packed 2:4 tiles -> dense rows in the cache, 64 bytes at a time, as an AMX weight tile takes
// them.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "linear24.h"

namespace cast {
namespace {

// What a kind of weight changes: a packed tile is 8 rows of two steps, a step 64 dense bytes.
enum class AmxWeights { kBf16With24, kInt8With24, kDenseInt8 };

constexpr int64_t kStepBytes = 64;
constexpr int64_t kAmxTileSteps = 2;

constexpr int64_t amx_tile_bytes(AmxWeights weights) {
  if (weights == AmxWeights::kDenseInt8) return kDenseInt8TileBytes;
  if (weights == AmxWeights::kInt8With24) return kInt8TileBytes;
  return kTileRows * (kTileKept * 2 + 8);
}

// Positions (two groups a byte) -> which of the eight columns are kept, a bit each.
inline __m512i kept_columns(__m512i positions) {
  alignas(16) uint8_t low_bits[16] = {}, high_bits[16] = {};
  for (int a = 0; a < 4; ++a)
    for (int b = a + 1; b < 4; ++b) {
      low_bits[a | b << 2] = static_cast<uint8_t>(1 << a | 1 << b);
      high_bits[a | b << 2] = static_cast<uint8_t>((1 << a | 1 << b) << 4);
    }
  const auto table = [](const uint8_t* bytes) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  };
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i low = _mm512_and_si512(positions, nibble);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi16(positions, 4), nibble);
  return _mm512_or_si512(_mm512_shuffle_epi8(table(low_bits), low),
                         _mm512_shuffle_epi8(table(high_bits), high));
}

// One packed tile -> dense[step][row], steps `step_stride` bytes apart and rows 64. A step of a 2:4
// row is 32 bytes of kept weights, put at the columns that its mask names.
template <AmxWeights kWeights>
inline void expand_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  constexpr int kRows = static_cast<int>(kTileRows);
  if constexpr (kWeights == AmxWeights::kDenseInt8) {
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kRows; ++i)
      _mm512_store_si512(dense + i % 2 * step_stride + i / 2 * 64,
                         _mm512_load_si512(tile + i * 64));
    return;
  }
  constexpr bool is_int8 = kWeights == AmxWeights::kInt8With24;
  constexpr int kMaskBytes = is_int8 ? 8 : 4;
  alignas(64) uint8_t masks[kRows * 2 * kMaskBytes];
#pragma GCC unroll 2
  for (int i = 0; i < kMaskBytes / 4; ++i)
    _mm512_store_si512(masks + i * 64, kept_columns(_mm512_load_si512(tile + kRows * 64 + i * 64)));
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) {
    const __m512i kept =
        _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(tile + i * 32)));
    __m512i row;
    if constexpr (is_int8) {
      __mmask64 mask;
      std::memcpy(&mask, masks + i * kMaskBytes, kMaskBytes);
      row = _mm512_maskz_expand_epi8(mask, kept);
    } else {
      __mmask32 mask;
      std::memcpy(&mask, masks + i * kMaskBytes, kMaskBytes);
      row = _mm512_maskz_expand_epi16(mask, kept);
    }
    _mm512_store_si512(dense + i % 2 * step_stride + i / 2 * 64, row);
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
