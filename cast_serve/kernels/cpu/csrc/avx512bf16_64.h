// bf16 weights that keep n of 64, by vpexpandw and vdpbf16ps.
#pragma once
#include "avx512_64.h"

namespace cast {
namespace {

constexpr int64_t kTileBytesOfX = 128;  // 64 columns

// Whether all of x is finite; from kXAt on x, [tile][token][64 columns], 0 where it is not.
constexpr int64_t kXAt = 64;

inline int64_t bf16_x_bytes(const Linear& p) {
  return kXAt + num_tiles64(p) * p.num_tokens * kTileBytesOfX;
}

inline void prepare_bf16_x(const Linear& p, void* workspace) {
  __mmask32 not_finite = 0;
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  uint8_t* to = static_cast<uint8_t*>(workspace) + kXAt;
  for_each_tile_of_x(p, [&](int64_t tile, int64_t token) {
    const auto* from = static_cast<const uint16_t*>(p.x) + token * p.x_stride + tile * 64;
    uint8_t* at = to + (tile * p.num_tokens + token) * kTileBytesOfX;
    for (int half = 0; half < 2; ++half) {
      const __m512i columns = _mm512_loadu_si512(from + half * 32);
      const __mmask32 is_not =
          _mm512_cmpeq_epi16_mask(_mm512_and_si512(columns, exponent), exponent);
      _mm512_storeu_si512(at + half * 64, _mm512_maskz_mov_epi16(~is_not, columns));
      not_finite |= is_not;
    }
  });
  *static_cast<bool*>(workspace) = not_finite == 0;
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
__attribute__((noinline)) void run_few_bf16_64(const Linear& p, const uint8_t* all_x, int64_t begin,
                                               int64_t end) {
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
      for (int first = 0; first < kSteps64; first += kTurns, ahead += kTurns * ahead_step) {
#pragma GCC unroll 4
        for (int turn = 0; turn < kTurns; ++turn) {
          const int step = first + turn;
          _mm_prefetch(reinterpret_cast<const char*>(ahead + turn * ahead_step), _MM_HINT_T1);
          const __m512i weights = next_bf16_step(values, tile + values_bytes, step);
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token)
            sums[turn][token] =
                add_bf16_step(sums[turn][token], weights, x + token * kTileBytesOfX + step * 4);
        }
      }
    }
    for (int token = 0; token < kTokens; ++token) {
      __m512 sum = sums[0][token];
      for (int turn = 1; turn < kTurns; ++turn) sum = _mm512_add_ps(sum, sums[turn][token]);
      store_rows(p, row * kTileRows64, p.out_features, token, sum);
    }
  }
}

template <int kTokens>
inline void multiply_bf16_64(const Panel& panel, int64_t num_tiles, const uint8_t* x,
                             int64_t x_bytes, float* all_sums) {
  PanelSums<kTokens> sums;
  load_sums<kTokens>(all_sums, sums);
  for (int64_t i = 0; i < num_tiles; ++i, x += x_bytes) {
#pragma GCC unroll 2
    for (int step = 0; step < kSteps64; ++step) {
      __m512i weights[kPanelTileRows];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelTileRows; ++j) weights[j] = _mm512_load_si512(panel[i][j][step]);
#pragma GCC unroll 12
      for (int token = 0; token < kTokens; ++token) {
        const __m512bh two = (__m512bh)broadcast_4_bytes(x + token * kTileBytesOfX + step * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kPanelTileRows; ++j)
          sums[j][token] = _mm512_dpbf16_ps(sums[j][token], two, (__m512bh)weights[j]);
      }
    }
  }
  keep_sums<kTokens>(sums, all_sums);
}

inline void multiply_all_bf16_64(const Linear& p, const uint8_t* x, int64_t begin, int64_t end) {
  if (p.num_tokens <= kFewTokens64)
    return with_constant<kFewTokens64>(
        p.num_tokens, [&]<int kTokens>() { run_few_bf16_64<kTokens>(p, x, begin, end); });
  const int64_t values_bytes = values_bytes64(p);
  run_panels<12>(
      p, begin, end,
      [&](const uint8_t* tile, uint8_t(&to)[kSteps64][kStepBytes64]) {
        const uint8_t* values = tile;
        for (int step = 0; step < kSteps64; ++step)
          _mm512_store_si512(to[step], next_bf16_step(values, tile + values_bytes, step));
      },
      [&]<int kTokens>(const Panel& panel, int64_t tile, int64_t num_tiles, const uint8_t* const*,
                       int64_t first, float* sums) {
        multiply_bf16_64<kTokens>(panel, num_tiles,
                                  x + (tile * p.num_tokens + first) * kTileBytesOfX,
                                  p.num_tokens * kTileBytesOfX, sums);
      });
}

inline void run_bf16_64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  multiply_all_bf16_64(p, static_cast<const uint8_t*>(workspace) + kXAt, begin, end);
  if (!*static_cast<const bool*>(workspace)) add_not_finite64(p, begin, end);
}

}  // namespace
}  // namespace cast
