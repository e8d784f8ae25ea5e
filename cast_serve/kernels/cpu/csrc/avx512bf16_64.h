// bf16 weights that keep n of 64, by vpexpandw and vdpbf16ps.
//
// What a row drops is multiplied as 0 here, and 0 * Inf is NaN. So x that is not finite goes to
// generic64.h, which multiplies no dropped weight; a line at the workspace's beginning says so.
#pragma once
#include "avx512_64.h"

namespace cast {
namespace {

constexpr int64_t kTileBytesOfX = 128;  // 64 columns

// x, [tile][token][64 columns].
inline int64_t bf16_x_bytes(const Linear24& p) {
  return num_tiles64(p) * p.num_tokens * kTileBytesOfX;
}

// Returns whether all of x is finite.
inline bool prepare_bf16_x(const Linear24& p, uint8_t* to) {
  __mmask32 not_finite = 0;
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  for (int64_t tile = 0; tile < num_tiles64(p); ++tile)
    for (int64_t token = 0; token < p.num_tokens; ++token, to += kTileBytesOfX) {
      const auto* from = static_cast<const uint16_t*>(p.x) + token * p.x_stride + tile * 64;
      for (int half = 0; half < 2; ++half) {
        const __m512i columns = _mm512_loadu_si512(from + half * 32);
        not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(columns, exponent), exponent);
        _mm512_storeu_si512(to + half * 64, columns);
      }
    }
  return not_finite == 0;
}

inline __m512i next_bf16_step(const uint8_t*& values, const uint8_t* masks, int step) {
  uint32_t mask;
  std::memcpy(&mask, masks + step * 4, 4);
  const __m512i kept = _mm512_loadu_si512(values);  // and what follows: masks at the end
  values += 2 * __builtin_popcount(mask);
  return _mm512_maskz_expand_epi16(mask, kept);
}

inline __m512 add_bf16_step(__m512 sum, __m512i weights, const uint8_t* two) {
  return _mm512_dpbf16_ps(sum, (__m512bh)broadcast_4_bytes(two), (__m512bh)weights);
}

template <int kTokens>
__attribute__((noinline)) void run_few_bf16_64(const Linear24& p, const uint8_t* all_x,
                                               int64_t begin, int64_t end) {
  // A sum takes six cycles to be ready.
  constexpr int kTurns = kTokens >= 6 ? 1 : kTokens >= 3 ? 2 : 4;
  const int64_t num_tiles = num_tiles64(p), tile_bytes = tile_bytes64(p);
  const int64_t values_bytes = values_bytes64(p), ahead_step = (tile_bytes + 31) / 32;
  const uint8_t* tile = p.packed + begin * num_tiles * tile_bytes;
  for (int64_t row = begin; row < end; ++row) {
    __m512 sums[kTurns][kTokens] = {};
    const uint8_t* x = all_x;
    for (int64_t i = 0; i < num_tiles; ++i, tile += tile_bytes, x += kTokens * kTileBytesOfX) {
      const uint8_t *values = tile, *ahead = tile + kBytesAhead64;
#pragma GCC unroll 4
      for (int step = 0; step < kSteps64; ++step, ahead += ahead_step) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        const __m512i weights = next_bf16_step(values, tile + values_bytes, step);
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          __m512& sum = sums[step % kTurns][token];
          sum = add_bf16_step(sum, weights, x + token * kTileBytesOfX + step * 4);
        }
      }
    }
    for (int token = 0; token < kTokens; ++token) {
      __m512 sum = sums[0][token];
      for (int turn = 1; turn < kTurns; ++turn) sum = _mm512_add_ps(sum, sums[turn][token]);
      store_rows(p, row * kTileRows64, token, sum);
    }
  }
}

template <int kTokens>
inline void multiply_bf16_64(const PanelTile& panel, const uint8_t* x, float* all_sums) {
  __m512 sums[kPanelTileRows][kTokens];
#pragma GCC unroll 2
  for (int j = 0; j < kPanelTileRows; ++j)
#pragma GCC unroll 12
    for (int token = 0; token < kTokens; ++token)
      sums[j][token] = _mm512_load_ps(all_sums + (token * kPanelTileRows + j) * kTileRows64);
#pragma GCC unroll 2
  for (int step = 0; step < kSteps64; ++step) {
    const __m512i above = _mm512_load_si512(panel[0][step]);
    const __m512i below = _mm512_load_si512(panel[1][step]);
#pragma GCC unroll 12
    for (int token = 0; token < kTokens; ++token) {
      const uint8_t* two = x + token * kTileBytesOfX + step * 4;
      sums[0][token] = add_bf16_step(sums[0][token], above, two);
      sums[1][token] = add_bf16_step(sums[1][token], below, two);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kPanelTileRows; ++j)
#pragma GCC unroll 12
    for (int token = 0; token < kTokens; ++token)
      _mm512_store_ps(all_sums + (token * kPanelTileRows + j) * kTileRows64, sums[j][token]);
}

inline void run_bf16_64(const Linear24& p, const uint8_t* x, int64_t begin, int64_t end) {
  if (p.num_tokens <= kFewTokens64)
    return with_constant<kFewTokens64>(
        p.num_tokens, [&]<int kTokens>() { run_few_bf16_64<kTokens>(p, x, begin, end); });
  const int64_t values_bytes = values_bytes64(p);
  run_panels(
      p, begin, end,
      [&](const uint8_t* tile, uint8_t(&to)[kSteps64][kStepBytes64]) {
        const uint8_t* values = tile;
        for (int step = 0; step < kSteps64; ++step)
          _mm512_store_si512(to[step], next_bf16_step(values, tile + values_bytes, step));
      },
      [&]<int kTokens>(const PanelTile& panel, int64_t tile,
                       const uint8_t* const(&)[kPanelTileRows], int64_t first, float* sums) {
        multiply_bf16_64<kTokens>(panel, x + (tile * p.num_tokens + first) * kTileBytesOfX, sums);
      });
}

}  // namespace
}  // namespace cast
