// x as AMX takes it: in blocks of 16 tokens and steps of 64 bytes of K, each step a tile of x.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "amx_expand.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

constexpr int64_t kRegisterTokens = 16;  // of a tile register

inline int64_t amx_tile_columns(const Linear& p, Weights weights) {
  return weights == Weights::kOfXsDType ? p.num_tile_columns() : p.num_int8_tile_columns();
}

// The tokens are cut in blocks of 16; fewer than 16 have 1, 2, 4 or 8 lanes.
inline int64_t amx_lanes(const Linear& p) {
  return p.num_tokens >= 16 ? 16 : std::bit_ceil(static_cast<uint64_t>(p.num_tokens));
}

inline int64_t amx_token_blocks(const Linear& p) {
  return (p.num_tokens + kRegisterTokens - 1) / kRegisterTokens;
}

// x: [block of tokens][step][16][lanes] times 4 bytes, so that a step is a tile of x; [lanes][16]
// for weights that keep n of 64.
inline int64_t amx_x_step_bytes(const Linear& p) { return 16 * 4 * amx_lanes(p); }

inline int64_t amx_x_block_bytes(const Linear& p, Weights weights) {
  return amx_tile_columns(p, weights) * kAmxTileSteps * amx_x_step_bytes(p);
}

inline int64_t amx_x_bytes(const Linear& p, Weights weights) {
  return (amx_token_blocks(p) * amx_x_block_bytes(p, weights) + 63) / 64 * 64;
}

// Sixteen tokens' 64 bytes of K -> a tile of x. kIsInt8: groups of four columns in the order of
// int8_group, unless the weights keep n of 64.
template <bool kIsInt8>
inline void store_x_tile(const Linear& p, __m512i rows[16], uint8_t* to) {
  const int64_t lanes = amx_lanes(p);
  if (p.kept != 0) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < lanes) _mm512_storeu_si512(to + i * 64, rows[i]);
    return;
  }
  const auto lane_mask = static_cast<__mmask16>((1u << lanes) - 1);
  transpose_16x16(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    _mm512_mask_storeu_epi32(to + i * lanes * 4, lane_mask, rows[kIsInt8 ? int8_group(i) : i]);
}

// bf16 x, 0 where it is not finite. Returns whether all of it is: a zero at a dropped weight times
// Inf would be NaN.
inline bool prepare_amx_bf16(const Linear& p, uint8_t* workspace) {
  const int64_t steps = p.num_tile_columns() * kAmxTileSteps;
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  __mmask32 not_finite = 0;
  for (int64_t first = 0; first < p.num_tokens; first += kRegisterTokens)
    for (int64_t step = 0; step < steps; ++step, workspace += amx_x_step_bytes(p)) {
      const int64_t left = std::clamp<int64_t>(p.in_features - step * 32, 0, 32);
      const auto inside = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        rows[i] = _mm512_setzero_si512();
        if (first + i >= p.num_tokens) continue;
        const uint16_t* x =
            static_cast<const uint16_t*>(p.x) + (first + i) * p.x_stride + step * 32;
        rows[i] = _mm512_maskz_loadu_epi16(inside, x);
        const __mmask32 is_not =
            _mm512_cmpeq_epi16_mask(_mm512_and_si512(rows[i], exponent), exponent);
        rows[i] = _mm512_maskz_mov_epi16(~is_not, rows[i]);
        not_finite |= is_not;
      }
      store_x_tile<false>(p, rows, workspace);
    }
  return not_finite == 0;
}

// x as integers, then the scales: [block of tokens][scale group][16], those of fewer lanes
// repeated.
inline float* amx_scales(const Linear& p, const void* workspace) {
  uint8_t* bytes = static_cast<uint8_t*>(const_cast<void*>(workspace));
  return reinterpret_cast<float*>(bytes + amx_x_bytes(p, Weights::kInt8));
}

inline int64_t amx_int8_bytes(const Linear& p) {
  return amx_x_bytes(p, Weights::kInt8) + amx_token_blocks(p) * p.num_int8_tile_columns() * 16 * 4;
}

inline void prepare_amx_int8(const Linear& p, void* workspace) {
  const int64_t lanes = amx_lanes(p), groups = p.num_int8_tile_columns();
  uint8_t* to = static_cast<uint8_t*>(workspace);
  float* scales = amx_scales(p, workspace);
  for (int64_t first = 0; first < p.num_tokens; first += kRegisterTokens)
    for (int64_t group = 0; group < groups; ++group, scales += 16) {
      alignas(64) uint8_t integers[16][kInt8TileColumns];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float scale = 0;
        if (first + lane < p.num_tokens)
          scale = quantize(p, first + lane, group, integers[lane]);
        else
          std::memset(integers[lane], kZero, kInt8TileColumns);
        for (int64_t i = lane; i < 16; i += lanes) scales[i] = scale;
      }
      for (int64_t step = 0; step < kAmxTileSteps; ++step, to += amx_x_step_bytes(p)) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          rows[i] = i < lanes ? _mm512_xor_si512(_mm512_load_si512(integers[i] + step * 64),
                                                 _mm512_set1_epi8(-128))  // signed again
                              : _mm512_setzero_si512();
        store_x_tile<true>(p, rows, to);
      }
    }
}

}  // namespace
}  // namespace cast
