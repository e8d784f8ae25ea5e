// The kernel for many tokens of avx512vnni.cpp, which is fast from four tokens on.
//
// Pairs of tiles are taken apart once for up to 256 tokens, and multiplied with rows in lanes
// (avx512vnni_lanes.h). x of a segment of K stays in L1 while a slab of tile rows meets it, and the
// slab's sums stay in L2.
#pragma once
#include <algorithm>
#include <cstring>

#include "avx512vnni_lanes.h"

namespace cast {
namespace {

constexpr int64_t kInt8SlabRows = 32;                      // tile rows; even
constexpr int64_t kInt8PassTokens = 256;                   // that share tiles taken apart
constexpr int64_t kInt8SegmentBytes = 16 << 10;            // of x
constexpr int64_t kInt8FewAhead = 16, kInt8MostAhead = 2;  // pairs of tiles that are prefetched

// Tokens are multiplied four, eight or sixteen at a time.
inline int64_t int8_padded_tokens(const Linear24& p) { return (p.num_tokens + 3) / 4 * 4; }

// x -> [tile][token] 128 integers, then the scales, [tile][token].
inline int64_t int8_many_bytes(const Linear24& p) {
  return int8_padded_tokens(p) * p.num_int8_tile_columns() * (kInt8TileColumns + 4);
}

inline const float* int8_many_scales(const Linear24& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  const int64_t padded_k = p.num_int8_tile_columns() * kInt8TileColumns;
  return reinterpret_cast<const float*>(integers + int8_padded_tokens(p) * padded_k);
}

inline void prepare_int8_many(const Linear24& p, void* workspace) {
  constexpr int64_t kRows = 16;  // of x at a time
  const int64_t tiles = p.num_int8_tile_columns(), size = element_bytes(p.dtype);
  const int64_t padded = int8_padded_tokens(p);
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

// The pairs of tiles in the order in which they are multiplied: slab by slab, in it segment by
// segment, in that tile rows two by two.
struct TileWalk {
  int64_t end, row_tiles, segment_tiles;  // end: of the tile rows
  int64_t slab, row, segment = 0, tile = 0;

  int64_t slab_end() const { return std::min(slab + kInt8SlabRows, end); }
  int64_t segment_end() const { return std::min(segment + segment_tiles, row_tiles); }

  void advance() {
    if (++tile == segment_end()) {
      row += 2;
      if (row >= slab_end()) {
        segment = segment_end();
        if (segment == row_tiles) segment = 0, slab += kInt8SlabRows;
        row = slab;
      }
      tile = segment;
    }
  }
};

// A slab's sums, [16 rows][padded token][row], of some tokens -> x's dtype, with scale and bias.
inline void store_int8_slab(const Linear24& p, int64_t first_n, int64_t last_n, int64_t first_token,
                            int64_t padded, const float* sums) {
  const int64_t tokens = std::min(p.num_tokens - first_token, padded);
  const int64_t size = element_bytes(p.dtype);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t n = first_n; n < last_n; n += kLaneRows) {
      const int64_t left = std::min<int64_t>(last_n - n, kLaneRows);
      const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
      __m512 sum = _mm512_load_ps(sums + (n - first_n) * padded + token * kLaneRows);
      if (p.scale) sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(inside, p.scale + n));
      if (p.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, p.bias + n));
      uint8_t* out =
          static_cast<uint8_t*>(p.out) + ((first_token + token) * p.out_features + n) * size;
      alignas(64) uint8_t rounded[64];
      uint8_t* to = left == kLaneRows ? out : rounded;
      store_8(p.dtype, _mm512_castps512_ps256(sum), to);
      store_8(p.dtype, _mm512_extractf32x8_ps(sum, 1), to + 8 * size);
      if (to == rounded) std::memcpy(out, rounded, left * size);
    }
}

template <Weights kWeights, int kGroups>
void run_int8_many(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  constexpr bool kIsInt4 = kWeights == Weights::kInt4;
  constexpr int kLines = kIsInt4 ? 7 : kInt8TileBytes / 64;
  static const uint8_t no_tile[kInt8TileBytes] = {};  // beside a last tile row
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  const float* all_scales = int8_many_scales(p, workspace);
  const int64_t row_tiles = p.num_int8_tile_columns(), padded = int8_padded_tokens(p);
  const int64_t tile_bytes = kIsInt4 ? p.int4_tile_bytes() : kInt8TileBytes;
  const int64_t row_bytes = row_tiles * tile_bytes;
  const int64_t x_bytes = std::min(padded, kInt8PassTokens) * kInt8TileColumns;  // of a tile
  const int64_t segment_tiles = std::clamp<int64_t>(kInt8SegmentBytes / x_bytes, 1, row_tiles);
  const int64_t pairs_ahead = padded <= 16 ? kInt8FewAhead : kInt8MostAhead;
  alignas(64) float sums[kInt8SlabRows / 2 * kInt8PassTokens * kLaneRows];
  KeptTiles kept;
  for (int64_t slab = begin; slab < end; slab += kInt8SlabRows) {
    const int64_t slab_end = std::min(slab + kInt8SlabRows, end);
    for (int64_t first = 0; first < padded; first += kInt8PassTokens) {
      const int64_t tokens = std::min(padded - first, kInt8PassTokens);
      std::memset(sums, 0, (slab_end - slab + 1) / 2 * tokens * kLaneRows * sizeof(float));
      TileWalk at = {end, row_tiles, segment_tiles, slab, slab}, ahead = at;
      for (int64_t i = 0; i < pairs_ahead; ++i) ahead.advance();
      for (; at.slab == slab; at.advance(), ahead.advance()) {
        const uint8_t* packed = p.packed + at.row * row_bytes + at.tile * tile_bytes;
        const uint8_t* const tiles[2] = {packed, at.row + 1 < end ? packed + row_bytes : no_tile};
        const uint8_t* next = p.packed + ahead.row * row_bytes + ahead.tile * tile_bytes;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          if (p.tuning.prefetch == Prefetch::kT0)
            prefetch<kLines, Prefetch::kT0>(next + i * row_bytes);
          else
            prefetch<kLines, Prefetch::kT1>(next + i * row_bytes);
        }
        const uint8_t* x = integers + (at.tile * padded + first) * kInt8TileColumns;
        const float* scales = all_scales + at.tile * padded + first;
        float* to = sums + (at.row - slab) / 2 * tokens * kLaneRows;
        if (tokens == 4) {
          multiply_at_once<kWeights, kGroups, 4>(tiles, x, scales, to);
        } else if (tokens == 8) {
          multiply_at_once<kWeights, kGroups, 8>(tiles, x, scales, to);
        } else {
          keep<kWeights, kGroups>(tiles, kept);
          int64_t token = 0;
          const auto multiply = [&]<int kTokens>() {
            multiply_kept<kWeights, kGroups, kTokens>(kept, x + token * kInt8TileColumns,
                                                      scales + token, to + token * kLaneRows);
            token += kTokens;
          };
          while (token + 16 <= tokens) multiply.template operator()<16>();
          if (token + 8 <= tokens) multiply.template operator()<8>();
          if (token < tokens) multiply.template operator()<4>();
        }
      }
      store_int8_slab(p, slab * kTileRows, std::min(slab_end * kTileRows, p.out_features), first,
                      tokens, sums);
    }
  }
}

}  // namespace
}  // namespace cast
