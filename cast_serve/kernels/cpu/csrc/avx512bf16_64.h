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

// On Zen 4 the form of vpexpandw that zeroes what is dropped takes 2.5 times as long as this one,
// which leaves there what a register has. The empty asm keeps GCC from taking the other.
inline __m512i next_bf16_step(const uint8_t*& values, const uint8_t* masks, int step) {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  uint32_t mask;
  std::memcpy(&mask, masks + step * 4, 4);
  const __m512i kept = _mm512_loadu_si512(values);  // and what follows: masks at the end
  values += 2 * __builtin_popcount(mask);
  return _mm512_mask_expand_epi16(zero, mask, kept);
}

template <int kTokens>
__attribute__((noinline)) void run_few_bf16_64(const Linear& p, const uint8_t* x, int64_t first,
                                               int64_t row, int64_t end) {
  // A sum takes six cycles to be ready.
  constexpr int kTurns = kTokens >= 3 ? 1 : kTokens == 2 ? 2 : 4;
  const int64_t values_bytes = values_bytes64(p);
  RowsTogether<kRowsTogether> rows(p, row, end);
  __m512 sums[kTurns][kRowsTogether][kTokens] = {};
  x += first * kTileBytesOfX;
  for (int64_t tile = 0; tile < rows.num_tiles; ++tile, rows.end_tile()) {
    rows.begin_tile(tile);
    const uint8_t* values[kRowsTogether] = {rows.tiles[0], rows.tiles[1]};
#pragma GCC unroll 2
    for (int from = 0; from < kSteps64; from += kTurns)
#pragma GCC unroll 4
      for (int turn = 0; turn < kTurns; ++turn) {
        const int step = from + turn;
        __m512i weights[kRowsTogether];
#pragma GCC unroll 2
        for (int j = 0; j < kRowsTogether; ++j) {
          rows.prefetch(j);
          weights[j] = next_bf16_step(values[j], rows.tiles[j] + values_bytes, step);
        }
#pragma GCC unroll 12
        for (int token = 0; token < kTokens; ++token) {
          const __m512bh two = (__m512bh)broadcast_4_bytes(x + token * kTileBytesOfX + step * 4);
#pragma GCC unroll 2
          for (int j = 0; j < kRowsTogether; ++j)
            sums[turn][j][token] =
                _mm512_dpbf16_ps(sums[turn][j][token], two, (__m512bh)weights[j]);
        }
      }
    x += p.num_tokens * kTileBytesOfX;
  }
  for (int token = 0; token < kTokens; ++token)
    for (int j = 0; j < kRowsTogether && row + j < end; ++j) {
      __m512 sum = sums[0][j][token];
      for (int turn = 1; turn < kTurns; ++turn) sum = _mm512_add_ps(sum, sums[turn][j][token]);
      store_rows(p, (row + j) * kTileRows64, p.out_features, first + token, sum);
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
      __m512i weights[kRowsTogether];
#pragma GCC unroll 4
      for (int j = 0; j < kRowsTogether; ++j) weights[j] = _mm512_load_si512(panel[i][j][step]);
#pragma GCC unroll 12
      for (int token = 0; token < kTokens; ++token) {
        const __m512bh two = (__m512bh)broadcast_4_bytes(x + token * kTileBytesOfX + step * 4);
#pragma GCC unroll 4
        for (int j = 0; j < kRowsTogether; ++j)
          sums[j][token] = _mm512_dpbf16_ps(sums[j][token], two, (__m512bh)weights[j]);
      }
    }
  }
  keep_sums<kTokens>(sums, all_sums);
}

inline void multiply_all_bf16_64(const Linear& p, const uint8_t* x, int64_t begin, int64_t end) {
  if (p.num_tokens <= 24)  // beyond, panels are as fast or faster on Zen 4
    return run_few64<12, kRowsTogether>(p, begin, end,
                                        [&]<int kTokens>(int64_t first, int64_t row) {
                                          run_few_bf16_64<kTokens>(p, x, first, row, end);
                                        });
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
