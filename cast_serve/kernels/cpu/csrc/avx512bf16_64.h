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
    prefetch_x<2>(p, tile, token);
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
  values += 2 * static_cast<uint64_t>(__builtin_popcount(mask));
  return _mm512_mask_expand_epi16(zero, mask, kept);
}

// Adds to sums, [turn][tile row][token], the products of two tile rows' tiles with kTokens tokens
// of x. next(step, row) is a step's weights.
template <int kTokens, int kTurns, typename Next>
__attribute__((always_inline)) inline void add_bf16_tile(
    const uint8_t* x, const Next& next, __m512 (&sums)[kTurns][kRowsTogether][kTokens]) {
#pragma GCC unroll 2
  for (int from = 0; from < kSteps64; from += kTurns)
#pragma GCC unroll 4
    for (int turn = 0; turn < kTurns; ++turn) {
      const int step = from + turn;
      __m512i weights[kRowsTogether];
#pragma GCC unroll 2
      for (int j = 0; j < kRowsTogether; ++j) weights[j] = next(step, j);
#pragma GCC unroll 12
      for (int token = 0; token < kTokens; ++token) {
        const __m512bh two = (__m512bh)broadcast_4_bytes(x + token * kTileBytesOfX + step * 4);
#pragma GCC unroll 2
        for (int j = 0; j < kRowsTogether; ++j)
          sums[turn][j][token] = _mm512_dpbf16_ps(sums[turn][j][token], two, (__m512bh)weights[j]);
      }
    }
}

template <int kTokens, Prefetch kPrefetch>
__attribute__((noinline)) void run_few_bf16_64(const Linear& p, const uint8_t* x, int64_t first,
                                               int64_t row, int64_t end) {
  // A sum takes six cycles to be ready.
  constexpr int kTurns = kTokens >= 3 ? 1 : kTokens == 2 ? 2 : 4;
  const int64_t values_bytes = values_bytes64(p);
  RowsTogether<kRowsTogether, kPrefetch> rows(p, row, end);
  __m512 sums[kTurns][kRowsTogether][kTokens] = {};
  x += first * kTileBytesOfX;
  for (int64_t tile = 0; tile < rows.num_tiles; ++tile, rows.end_tile()) {
    rows.begin_tile();
    const uint8_t* values[kRowsTogether] = {rows.tiles[0], rows.tiles[1]};
    const auto next = [&](int step, int j) __attribute__((always_inline)) {
      rows.prefetch(j);
      return next_bf16_step(values[j], rows.tiles[j] + values_bytes, step);
    };
    add_bf16_tile<kTokens, kTurns>(x, next, sums);
    x += p.num_tokens * kTileBytesOfX;
  }
  for (int token = 0; token < kTokens; ++token)
    for (int j = 0; j < kRowsTogether && row + j < end; ++j) {
      __m512 sum = sums[0][j][token];
      for (int turn = 1; turn < kTurns; ++turn) sum = _mm512_add_ps(sum, sums[turn][j][token]);
      store_rows(p, (row + j) * kTileRows64, p.out_features, first + token, sum);
    }
}

template <int kTokens, bool kExpands>
__attribute__((noinline)) void multiply_bf16_64(const Linear& p, Panel& panel, int64_t num_tiles,
                                                const uint8_t* const* rows, const uint8_t* x,
                                                float* all_sums) {
  const int64_t values_bytes = values_bytes64(p), tile_bytes = tile_bytes64(p);
  PanelSums<kTokens> sums[1];
  load_sums<kTokens>(all_sums, sums[0]);
  for (int64_t i = 0; i < num_tiles; ++i, x += p.num_tokens * kTileBytesOfX) {
    const uint8_t* tiles[kRowsTogether] = {rows[0] + i * tile_bytes, rows[1] + i * tile_bytes};
    const uint8_t* values[kRowsTogether] = {tiles[0], tiles[1]};
    const auto next = [&](int step, int j) __attribute__((always_inline)) {
      uint8_t* at = panel[i][j][step];
      if constexpr (!kExpands) return _mm512_load_si512(at);
      const __m512i weights = next_bf16_step(values[j], tiles[j] + values_bytes, step);
      _mm512_store_si512(at, weights);
      return weights;
    };
    add_bf16_tile<kTokens, 1>(x, next, sums);
  }
  keep_sums<kTokens>(sums[0], all_sums);
}

inline void multiply_all_bf16_64(const Linear& p, const uint8_t* x, int64_t begin, int64_t end) {
  if (p.num_tokens <= 24)  // beyond, panels are as fast or faster on Zen 4
    return run_few64<12, kRowsTogether>(
        p, begin, end, [&]<int kTokens, Prefetch kPrefetch>(int64_t first, int64_t row) {
          run_few_bf16_64<kTokens, kPrefetch>(p, x, first, row, end);
        });
  run_panels<12>(
      p, begin, end,
      [&]<int kTokens, bool kExpands>(Panel& panel, int64_t tile, int64_t num_tiles,
                                      const uint8_t* const* rows, int64_t first, float* sums) {
        const int64_t at = (tile * p.num_tokens + first) * kTileBytesOfX;
        multiply_bf16_64<kTokens, kExpands>(p, panel, num_tiles, rows, x + at, sums);
      });
}

inline void run_bf16_64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  multiply_all_bf16_64(p, static_cast<const uint8_t*>(workspace) + kXAt, begin, end);
  if (!*static_cast<const bool*>(workspace)) add_not_finite64(p, begin, end);
}

}  // namespace
}  // namespace cast
