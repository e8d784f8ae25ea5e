// 8-bit and 4-bit weights that keep n of 64, by vpexpandb and vpdpbusd.
//
// vpdpbusd takes one side unsigned: here the weights, stored plus 128 or 8. What a row drops
// becomes 128 or 8 too, not 0, so that all rows are too large by that times the sum of x alone: a
// token's sums begin at minus that, a number for each scale group.
#pragma once
#include "avx512_64.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

// x, int8 [tile][token][128]; starts of the integer sums, [tile][scale group of the
// weights][token]; scales, [tile][token].
struct IntegerX {
  const uint8_t* integers;
  const int32_t* starts;
  const float* scales;

  // From a tile and a token on.
  template <int kGroups>
  IntegerX at(const Linear& p, int64_t tile, int64_t token) const {
    constexpr int kStarts = kGroups == 0 ? 1 : kGroups;
    const int64_t pair = tile * p.num_tokens + token;
    return {integers + pair * kInt8TileColumns, starts + tile * kStarts * p.num_tokens + token,
            scales + pair};
  }
};

inline int64_t groups64(const Linear& p) { return p.scale_group != 0 ? p.num_scale_groups() : 1; }

inline IntegerX integer_x(const Linear& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  const int64_t pairs = num_tiles64(p) * p.num_tokens;  // of a tile and a token
  const auto* starts = reinterpret_cast<const int32_t*>(integers + pairs * kInt8TileColumns);
  return {integers, starts, reinterpret_cast<const float*>(starts + pairs * groups64(p))};
}

inline int64_t integer_x_bytes(const Linear& p) {
  return num_tiles64(p) * p.num_tokens * (kInt8TileColumns + 4 * groups64(p) + 4);
}

inline void prepare_integer_x(const Linear& p, void* workspace) {
  const IntegerX x = integer_x(p, workspace);
  uint8_t* integers = static_cast<uint8_t*>(workspace);
  int32_t* starts = const_cast<int32_t*>(x.starts);
  float* scales = const_cast<float*>(x.scales);
  const int64_t groups = groups64(p);
  const int32_t offset = p.scale_group != 0 ? 8 : 128;
  for_each_tile_of_x(p, [&](int64_t tile, int64_t token) {
    const int64_t at = tile * p.num_tokens + token;
    uint8_t* to = integers + at * kInt8TileColumns;
    if (p.dtype != DType::kFloat32) prefetch_x<4>(p, tile, token);
    scales[at] = quantize(p, token, tile, to);
    __m512i of_four[2];  // sums of the four columns of a step
    for (int half = 0; half < 2; ++half) {
      const __m512i plus_zero = _mm512_loadu_si512(to + half * 64);
      _mm512_storeu_si512(to + half * 64, _mm512_xor_si512(plus_zero, _mm512_set1_epi8(-128)));
      of_four[half] =
          _mm512_dpbusd_epi32(_mm512_set1_epi32(-4 * kZero), plus_zero, _mm512_set1_epi8(1));
    }
    int32_t* start = starts + tile * groups * p.num_tokens + token;
    if (groups == 1) {
      *start = -offset * _mm512_reduce_add_epi32(_mm512_add_epi32(of_four[0], of_four[1]));
    } else {
      const int64_t a_half = groups / 2;
      for (int64_t group = 0; group < groups; ++group, start += p.num_tokens) {
        const __mmask16 steps = a_half == 1 ? 0xFFFF : group % 2 == 0 ? 0x00FF : 0xFF00;
        *start = -offset * _mm512_mask_reduce_add_epi32(steps, of_four[group / a_half]);
      }
    }
  });
}

// kGroups: scale groups of a tile of 4-bit weights; 0: 8-bit weights.
template <int kGroups>
struct Expander64 {
  static constexpr bool kIsInt4 = kGroups != 0;
  const __m512i dropped = _mm512_set1_epi8(kIsInt4 ? 8 : -128);
  const __m512i low_bits = _mm512_set1_epi8(15);
  const __m512i upper = _mm512_set1_epi64(0x1020408000000000);  // of GFNI: a byte's upper half
  const uint8_t* values[2];                                     // of both halves of a tile
  const uint8_t* masks;

  Expander64(const Linear& p, const uint8_t* tile) : masks(masks64(p, tile)) {
    values[0] = tile, values[1] = kIsInt4 ? tile : tile + kTileRows64 * p.kept;
  }
  // The next step of a half.
  template <int kHalf>
  __m512i next(int step) {
    const uint64_t mask = load_8_bytes(masks + (kHalf * kSteps64 / 2 + step) * 8);
    __m512i kept = _mm512_loadu_si512(values[kHalf]);  // and what follows: masks at the end
    values[kHalf] += __builtin_popcountll(mask);
    if constexpr (kIsInt4)
      kept = kHalf == 0 ? _mm512_and_si512(kept, low_bits)
                        : _mm512_gf2p8affine_epi64_epi8(kept, upper, 0);
    return _mm512_mask_expand_epi8(dropped, mask, kept);
  }
};

// The scales of a tile's rows.
inline __m512 row_scales64(const uint8_t* scales, int group) {
  const __m256i words =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + group * kTileRows64 * 2));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

using Dots64 = __v16si;  // GCC 12 copies an __m512i to and fro in loops of vpdpbusd

// Adds to sums the products of kRows tile rows' tiles with kTokens tokens of x. next<half>(step,
// row) is a step's weights.
template <int kGroups, int kTokens, int kRows, typename Next>
__attribute__((always_inline)) inline void add_tile64(const Linear& p, const IntegerX& x,
                                                      const uint8_t* const* tiles, const Next& next,
                                                      __m512 (&sums)[kRows][kTokens]) {
  constexpr int kHalfSteps = kSteps64 / 2, kPhases = kGroups == 4 ? 2 : 1;
  constexpr int kTurns = kRows * kTokens == 1 ? 2 : 1;  // a sum takes four cycles to be ready
  const int64_t scales_at = scales_at64(p);
  Dots64 dots[kTurns][kRows][kTokens];
  const auto run_half = [&]<int kHalf>() __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int phase = 0; phase < kPhases; ++phase) {
      const int group = kGroups == 4 ? kHalf * 2 + phase : kGroups == 2 ? kHalf : 0;
      if (kGroups > 1 || kHalf == 0)
#pragma GCC unroll 12
        for (int token = 0; token < kTokens; ++token)
#pragma GCC unroll 2
          for (int j = 0; j < kRows; ++j) {
            dots[kTurns - 1][j][token] = Dots64{};
            dots[0][j][token] = (Dots64)_mm512_set1_epi32(x.starts[group * p.num_tokens + token]);
          }
#pragma GCC unroll 2
      for (int i_step = 0; i_step < kHalfSteps / kPhases; i_step += kTurns)
#pragma GCC unroll 2
        for (int turn = 0; turn < kTurns; ++turn) {
          const int step = phase * (kHalfSteps / kPhases) + i_step + turn;
          __m512i weights[kRows];
#pragma GCC unroll 2
          for (int j = 0; j < kRows; ++j) weights[j] = next.template operator()<kHalf>(step, j);
#pragma GCC unroll 12
          for (int token = 0; token < kTokens; ++token) {
            const __m512i four =
                broadcast_4_bytes(x.integers + token * kInt8TileColumns + kHalf * 64 + step * 4);
#pragma GCC unroll 2
            for (int j = 0; j < kRows; ++j)
              dots[turn][j][token] =
                  (Dots64)_mm512_dpbusd_epi32((__m512i)dots[turn][j][token], weights[j], four);
          }
        }
      if (kGroups > 1 || kHalf == 1)
#pragma GCC unroll 2
        for (int j = 0; j < kRows; ++j) {
          __m512 of_rows = _mm512_setzero_ps();
          if constexpr (kGroups != 0) of_rows = row_scales64(tiles[j] + scales_at, group);
#pragma GCC unroll 12
          for (int token = 0; token < kTokens; ++token) {
            __m512 scale = _mm512_set1_ps(x.scales[token]);
            if constexpr (kGroups != 0) scale = _mm512_mul_ps(scale, of_rows);
            Dots64 dot = dots[0][j][token];
            if constexpr (kTurns == 2) dot += dots[1][j][token];
            sums[j][token] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)dot), scale, sums[j][token]);
          }
        }
    }
  };
  run_half.template operator()<0>();
  run_half.template operator()<1>();
}

template <int kGroups, int kTokens, int kRows, Prefetch kPrefetch>
__attribute__((noinline)) void run_few_integers64(const Linear& p, const IntegerX& all_x,
                                                  int64_t first, int64_t row, int64_t end) {
  RowsTogether<kRows, kPrefetch> rows(p, row, end);
  __m512 sums[kRows][kTokens] = {};
  for (int64_t tile = 0; tile < rows.num_tiles; ++tile, rows.end_tile()) {
    rows.begin_tile();
    // Of one row the second is not used.
    Expander64<kGroups> steps[2] = {{p, rows.tiles[0]}, {p, rows.tiles[kRows - 1]}};
    const auto next = [&]<int kHalf>(int step, int j) __attribute__((always_inline)) {
      rows.prefetch(j);
      return steps[j].template next<kHalf>(step);
    };
    add_tile64<kGroups, kTokens, kRows>(p, all_x.at<kGroups>(p, tile, first), rows.tiles, next,
                                        sums);
  }
  for (int token = 0; token < kTokens; ++token)
    for (int j = 0; j < kRows && row + j < end; ++j)
      store_rows(p, (row + j) * kTileRows64, p.out_features, first + token, sums[j][token]);
}

// The float sums stay in registers over a panel's tiles, beside the integer sums of a scale group.
template <int kGroups, int kTokens, bool kExpands>
__attribute__((noinline)) void multiply_integers64(const Linear& p, const IntegerX& all_x,
                                                   Panel& panel, int64_t first_tile,
                                                   int64_t num_tiles, const uint8_t* const* rows,
                                                   int64_t first, float* all_sums) {
  PanelSums<kTokens> sums;
  load_sums<kTokens>(all_sums, sums);
  for (int64_t i = 0; i < num_tiles; ++i) {
    const uint8_t* tiles[kRowsTogether];
    for (int j = 0; j < kRowsTogether; ++j) tiles[j] = rows[j] + i * tile_bytes64(p);
    Expander64<kGroups> steps[kRowsTogether] = {{p, tiles[0]}, {p, tiles[1]}};
    const auto next = [&]<int kHalf>(int step, int j) __attribute__((always_inline)) {
      uint8_t* at = panel[i][j][kHalf * (kSteps64 / 2) + step];
      if constexpr (!kExpands) return _mm512_load_si512(at);
      const __m512i weights = steps[j].template next<kHalf>(step);
      _mm512_store_si512(at, weights);
      return weights;
    };
    add_tile64<kGroups, kTokens, kRowsTogether>(p, all_x.at<kGroups>(p, first_tile + i, first),
                                                tiles, next, sums);
  }
  keep_sums<kTokens>(sums, all_sums);
}

template <int kGroups>
void run_integers64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  const IntegerX x = integer_x(p, workspace);
  if (kGroups == 0 && p.num_tokens <= 4)
    return run_few64<4, 1>(
        p, begin, end, [&]<int kTokens, Prefetch kPrefetch>(int64_t first, int64_t row) {
          run_few_integers64<kGroups, kTokens, 1, kPrefetch>(p, x, first, row, end);
        });
  if (p.num_tokens <= (kGroups == 0 ? 16 : 8))  // beyond, panels are as fast or faster on Zen 4
    return run_few64<8, kRowsTogether>(
        p, begin, end, [&]<int kTokens, Prefetch kPrefetch>(int64_t first, int64_t row) {
          run_few_integers64<kGroups, kTokens, kRowsTogether, kPrefetch>(p, x, first, row, end);
        });
  // More tokens at a time leave registers: with a scale for every 32 columns too often.
  run_panels<kGroups == 4 ? 6 : 8>(
      p, begin, end,
      [&]<int kTokens, bool kExpands>(Panel& panel, int64_t tile, int64_t num_tiles,
                                      const uint8_t* const* rows, int64_t first, float* sums) {
        multiply_integers64<kGroups, kTokens, kExpands>(p, x, panel, tile, num_tiles, rows, first,
                                                        sums);
      });
}

inline void run_int4_of_64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  switch (p.scale_group) {
    case 128:
      return run_integers64<1>(p, workspace, begin, end);
    case 64:
      return run_integers64<2>(p, workspace, begin, end);
    default:
      return run_integers64<4>(p, workspace, begin, end);
  }
}

}  // namespace
}  // namespace cast
