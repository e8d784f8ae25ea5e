// Packed tiles -> dense rows in the cache, 64 bytes at a time, as an AMX weight tile takes them.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "avx512bf16_64.h"
#include "avx512vnni64.h"
#include "avx512vnni_int4.h"
#include "linear24.h"

namespace cast {
namespace {

// A packed tile is 8 rows of two steps of x, a step 64 dense bytes. Its dense weights are two steps
// too; those of 4 bits with four scale groups four, each with zeros in the other group's columns.
constexpr int64_t kStepBytes = 64;
constexpr int64_t kAmxTileSteps = 2;
constexpr int64_t kMostDenseSteps = 4;

// Weights::kOfXsDType is bf16 here.
inline int64_t amx_tile_bytes(const Linear& p, Weights weights) {
  if (p.kept != 0) return tile_bytes64(p);
  if (weights == Weights::kDenseInt8) return kDenseInt8TileBytes;
  if (weights == Weights::kInt8) return kInt8TileBytes;
  if (weights == Weights::kInt4) return p.int4_tile_bytes();
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

// bf16: a row's kept weights go to the columns that its mask names.
inline void expand_bf16_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  constexpr int kRows = static_cast<int>(kTileRows);
  alignas(64) uint8_t masks[kRows * 8];
  _mm512_store_si512(masks, kept_columns(_mm512_load_si512(tile + kRows * 64)));
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) {
    const __m256i kept = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + i * 32));
    __mmask32 mask;
    std::memcpy(&mask, masks + i * 4, 4);
    _mm512_store_si512(dense + i % 2 * step_stride + i / 2 * 64,
                       _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(kept)));
  }
}

// A step of int8 is 16 groups of four columns. They change places, so that one shift by 4 * (i / 2)
// finds the positions of the i-th four bytes in its half of the 64 bits.
constexpr int int8_group(int i) { return i % 2 * 8 + i / 2; }

// Positions of a group of four -> for each column, which of the two kept bytes it gets; 32 is none.
constexpr std::array<uint32_t, 16> kept_bytes() {
  std::array<uint32_t, 16> bytes = {};
  for (uint32_t a = 0; a < 4; ++a)
    for (uint32_t b = a + 1; b < 4; ++b)
      for (uint32_t c = 0; c < 4; ++c)
        bytes[a | b << 2] |= (c == a ? 0u : c == b ? 1u : 32u) << c * 8;
  return bytes;
}

// int8: each dense byte is looked up in the kept ones, whose bytes from 32 on are zero. vpexpandb
// takes twice as long.
struct Int8Step {
  __m512i table, shifts, bases;

  Int8Step() {
    static constexpr std::array<uint32_t, 16> kKeptBytes = kept_bytes();
    alignas(64) uint32_t shift[16], base[16];  // of the i-th four bytes
    for (int i = 0; i < 16; ++i) shift[i] = i / 2 * 4, base[i] = 0x01010101u * 2 * int8_group(i);
    table = _mm512_loadu_si512(kKeptBytes.data());
    shifts = _mm512_load_si512(shift), bases = _mm512_load_si512(base);
  }
  // A row's step: 64 bits of positions and 32 kept bytes.
  __m512i dense(const uint8_t* positions, __m256i kept) const {
    int64_t bits;
    std::memcpy(&bits, positions, 8);
    const __m512i shifted = _mm512_srlv_epi32(_mm512_set1_epi64(bits), shifts);
    const __m512i from = _mm512_or_si512(_mm512_permutexvar_epi32(shifted, table), bases);
    return _mm512_permutexvar_epi8(from, _mm512_zextsi256_si512(kept));
  }
};

inline void expand_int8_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  constexpr int kRows = static_cast<int>(kTileRows);
  const Int8Step step;
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kRows; ++i) {
    const __m256i kept = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + i * 32));
    _mm512_store_si512(dense + i % 2 * step_stride + i / 2 * 64,
                       step.dense(tile + kRows * 64 + i * 8, kept));
  }
}

template <int kGroups>
inline void expand_int4_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  constexpr int kRows = static_cast<int>(kTileRows);
  const Int8Step step;
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row, dense += 64) {
    const __m512i kept = int4_weights_in_order(tile + row * kInt4RowBytes);
    const uint8_t* positions = tile + kInt4PositionsAt + row * 16;
    const __m512i low = step.dense(positions, _mm512_castsi512_si256(kept));
    const __m512i high = step.dense(positions + 8, _mm512_extracti64x4_epi64(kept, 1));
    if constexpr (kGroups < 4) {
      _mm512_store_si512(dense, low);
      _mm512_store_si512(dense + step_stride, high);
    } else {  // in the order of int8_group, every other group of four is of the step's first half
      _mm512_store_si512(dense, _mm512_maskz_mov_epi32(0x5555, low));
      _mm512_store_si512(dense + step_stride, _mm512_maskz_mov_epi32(0xAAAA, low));
      _mm512_store_si512(dense + 2 * step_stride, _mm512_maskz_mov_epi32(0x5555, high));
      _mm512_store_si512(dense + 3 * step_stride, _mm512_maskz_mov_epi32(0xAAAA, high));
    }
  }
}

inline void expand_dense_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#pragma GCC unroll 16
  for (int i = 0; i < 2 * static_cast<int>(kTileRows); ++i)
    _mm512_store_si512(dense + i % 2 * step_stride + i / 2 * 64,
                       _mm512_permutexvar_epi32(order, _mm512_load_si512(tile + i * 64)));
}

// Weights that keep n of 64: a packed tile's 32 registers -> dense[step][16 registers], signed. Of
// four scale groups each has half of a step's registers, and zeros in the others. The tile `ahead`
// is prefetched line by line, since all at once they would wait for each other, into L1 or L2.
template <Weights kWeights, int kGroups>
inline void expand_tile64(const Linear& p, const uint8_t* tile, const uint8_t* ahead, bool into_l1,
                          uint8_t* dense, int64_t step_stride) {
  const uint8_t* ahead_end = ahead + tile_bytes64(p);
  const auto prefetch_line = [&] {
    if (ahead >= ahead_end) return;
    into_l1 ? prefetch<1, Prefetch::kT0>(ahead) : prefetch<1, Prefetch::kT1>(ahead);
    ahead += 64;
  };
  if constexpr (kWeights == Weights::kOfXsDType) {
    const uint8_t *values = tile, *masks = tile + values_bytes64(p);
#pragma GCC unroll 4
    for (int i = 0; i < kSteps64; ++i) {
      prefetch_line();
      _mm512_store_si512(dense + i / 16 * step_stride + i % 16 * 64,
                         next_bf16_step(values, masks, i));
    }
  } else {
    constexpr int kHalfSteps = kGroups == 4 ? 2 : 1;
    Expander64<kWeights == Weights::kInt4 ? kGroups : 0> steps(p, tile);
    const auto store = [&](int half, int i, __m512i weights) {
      uint8_t* to = dense + half * kHalfSteps * step_stride + i * 64;
      _mm512_store_si512(to + i / 8 * (kHalfSteps - 1) * step_stride,
                         _mm512_sub_epi8(weights, steps.dropped));
      if constexpr (kGroups == 4)
        _mm512_store_si512(to + (1 - i / 8) * step_stride, _mm512_setzero_si512());
    };
#pragma GCC unroll 4
    for (int i = 0; i < 16; ++i) {
      prefetch_line();
      store(0, i, steps.template next<0>(i));
      prefetch_line();
      store(1, i, steps.template next<1>(i));
    }
  }
}

// One packed tile -> dense[step][row], steps `step_stride` bytes apart and rows 64; int8 groups in
// the order of int8_group. kGroups: scale groups of a tile of 4-bit weights.
template <Weights kWeights, int kGroups>
inline void expand_tile(const uint8_t* tile, uint8_t* dense, int64_t step_stride) {
  if constexpr (kWeights == Weights::kOfXsDType) expand_bf16_tile(tile, dense, step_stride);
  if constexpr (kWeights == Weights::kInt8) expand_int8_tile(tile, dense, step_stride);
  if constexpr (kWeights == Weights::kInt4) expand_int4_tile<kGroups>(tile, dense, step_stride);
  if constexpr (kWeights == Weights::kDenseInt8) expand_dense_tile(tile, dense, step_stride);
}

}  // namespace
}  // namespace cast
