// The linear with 2:4 weights of 8 or 4 bits or dense ones of 8, in portable C++, compiled once per
// ISA with that ISA's flags.
//
// As generic.h, with x quantised: its integers, as float, are transposed to [token block][K]
// [CAST_LANES tokens]. The sum of a scale group's products is below 2^21, so it is exact in float
// too. Behind the integers lie the scales, [token block][scale group][CAST_LANES tokens].
#pragma once
#include <algorithm>
#include <cstring>

#include "elements.h"
#include "generic.h"
#include "linear24.h"

namespace cast {
namespace CAST_ISA {

inline int64_t int8_lanes(const Linear& p) { return p.num_tokens == 1 ? 1 : CAST_LANES; }

inline int64_t int8_padded_tokens(const Linear& p) {
  const int64_t lanes = int8_lanes(p);
  return (p.num_tokens + lanes - 1) / lanes * lanes;
}

inline int64_t workspace_bytes_int8(const Linear& p) {
  const int64_t floats_of_token = p.num_int8_tile_columns() * (kInt8TileColumns + 1);
  return int8_padded_tokens(p) * floats_of_token * sizeof(float);
}

inline int64_t scales_offset(const Linear& p) {  // in floats
  return int8_padded_tokens(p) * p.num_int8_tile_columns() * kInt8TileColumns;
}

template <typename T>
void prepare_int8(const Linear& p, float* integers) {
  const int64_t lanes = int8_lanes(p), groups = p.num_int8_tile_columns();
  float* scales = integers + scales_offset(p);
  for (int64_t token = 0; token < int8_padded_tokens(p); ++token) {
    const int64_t block = token / lanes, lane = token % lanes;
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * kInt8TileColumns;
      float values[kInt8TileColumns] = {}, scale = 0.0f;
      if (token < p.num_tokens)
        scale = quantize_group(x + first, std::min(p.in_features - first, kInt8TileColumns), 0.0f,
                               values);
      scales[(block * groups + group) * lanes + lane] = scale;
      float* to = integers + (block * groups + group) * kInt8TileColumns * lanes + lane;
      for (int64_t i = 0; i < kInt8TileColumns; ++i) to[i * lanes] = values[i];
    }
  }
}

template <typename V>
void add_dense_int8_tile(const uint8_t* tile, const float* x, V scale, V (&sums)[kTileRows]) {
  const int8_t* values = reinterpret_cast<const int8_t*>(tile);
  const V* columns = reinterpret_cast<const V*>(x);
  for (int64_t row = 0; row < kTileRows; ++row) {
    V dot = {};
    for (int64_t i = 0; i < kInt8TileColumns; ++i)
      dot += columns[i] * static_cast<float>(values[row * kInt8TileColumns + i]);
    sums[row] += dot * scale;
  }
}

// The groups of four columns [begin, end) of a tile.
template <typename V>
void add_dots(const int8_t* values, const uint8_t* positions, const float* x, int64_t begin,
              int64_t end, V (&dots)[kTileRows]) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t group = begin; group < end; ++group) {
    const V* columns = reinterpret_cast<const V*>(x + group * 4 * lanes);
    for (int64_t row = 0; row < kTileRows; ++row) {
      const int both = positions[row * (kInt8TileColumns / 8) + group / 2] >> (group % 2 * 4);
      const int8_t* kept = values + row * kInt8TileKept + group * 2;
      dots[row] += columns[both & 3] * static_cast<float>(kept[0]) +
                   columns[both >> 2 & 3] * static_cast<float>(kept[1]);
    }
  }
}

template <typename V>
void add_int8_tile(const uint8_t* tile, const float* x, V scale, V (&sums)[kTileRows]) {
  V dots[kTileRows] = {};
  add_dots(reinterpret_cast<const int8_t*>(tile), tile + kTileRows * kInt8TileKept, x, 0,
           kInt8TileColumns / 4, dots);
  for (int64_t row = 0; row < kTileRows; ++row) sums[row] += dots[row] * scale;
}

template <typename V>
void add_int4_tile(const uint8_t* tile, int64_t groups, const float* x, V scale,
                   V (&sums)[kTileRows]) {
  int8_t values[kTileRows * kInt8TileKept];
  for (int64_t row = 0; row < kTileRows; ++row)
    int4_values(tile + row * kInt4RowBytes, values + row * kInt8TileKept);
  const int64_t size = kInt8TileColumns / 4 / groups;
  for (int64_t group = 0; group < groups; ++group) {
    V dots[kTileRows] = {};
    add_dots(values, tile + kInt4PositionsAt, x, group * size, (group + 1) * size, dots);
    for (int64_t row = 0; row < kTileRows; ++row)
      sums[row] += dots[row] * (scale * int4_scale(tile, groups, row, group));
  }
}

template <typename V, typename T, Weights kWeights>
void run_int8(const Linear& p, const float* integers, int64_t begin, int64_t end) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  const int64_t groups = p.num_int8_tile_columns();
  const float* scales = integers + scales_offset(p);
  const int64_t tile_bytes = kWeights == Weights::kInt4   ? p.int4_tile_bytes()
                             : kWeights == Weights::kInt8 ? kInt8TileBytes
                                                          : kDenseInt8TileBytes;
  for (int64_t first = 0; first < p.num_tokens; first += lanes) {
    const V* block_scales = reinterpret_cast<const V*>(scales + first * groups);
    const float* x = integers + first * groups * kInt8TileColumns;
    const int64_t tokens = std::min(p.num_tokens - first, lanes);
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      V sums[kTileRows] = {};
      for (int64_t group = 0; group < groups; ++group) {
        const uint8_t* tile = p.packed + (tile_row * groups + group) * tile_bytes;
        const float* columns = x + group * kInt8TileColumns * lanes;
        const V scale = block_scales[group];
        if constexpr (kWeights == Weights::kDenseInt8)
          add_dense_int8_tile(tile, columns, scale, sums);
        if constexpr (kWeights == Weights::kInt8) add_int8_tile(tile, columns, scale, sums);
        if constexpr (kWeights == Weights::kInt4)
          add_int4_tile(tile, p.num_scale_groups(), columns, scale, sums);
      }
      for (int64_t row = 0; row < kTileRows && tile_row * kTileRows + row < p.out_features; ++row) {
        const int64_t n = tile_row * kTileRows + row;
        float lane_sums[lanes];
        std::memcpy(lane_sums, &sums[row], sizeof(V));
        for (int64_t token = 0; token < tokens; ++token) {
          T* out = static_cast<T*>(p.out) + (first + token) * p.out_features + n;
          const float scale = kWeights == Weights::kInt4 ? 1.0f : p.scale[n];
          from_float(lane_sums[token] * scale + (p.bias ? p.bias[n] : 0.0f), out);
        }
      }
    }
  }
}

inline void prepare_int8_any(const Linear& p, void* workspace) {
  float* integers = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return prepare_int8<BFloat16>(p, integers);
    case DType::kFloat16:
      return prepare_int8<_Float16>(p, integers);
    case DType::kFloat32:
      return prepare_int8<float>(p, integers);
  }
}

template <typename T, Weights kWeights>
void run_int8_any_tokens(const Linear& p, const float* integers, int64_t begin, int64_t end) {
  return p.num_tokens == 1 ? run_int8<float, T, kWeights>(p, integers, begin, end)
                           : run_int8<Lanes, T, kWeights>(p, integers, begin, end);
}

template <Weights kWeights>
void run_int8_any(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  const float* integers = static_cast<const float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return run_int8_any_tokens<BFloat16, kWeights>(p, integers, begin, end);
    case DType::kFloat16:
      return run_int8_any_tokens<_Float16, kWeights>(p, integers, begin, end);
    case DType::kFloat32:
      return run_int8_any_tokens<float, kWeights>(p, integers, begin, end);
  }
}

template <Weights kWeights>
constexpr Product kOf = {workspace_bytes_int8, prepare_int8_any, run_int8_any<kWeights>};
constexpr Product kLinear24Int8 = kOf<Weights::kInt8>;
constexpr Product kLinear24Int4 = kOf<Weights::kInt4>;
constexpr Product kLinearInt8 = kOf<Weights::kDenseInt8>;

}  // namespace CAST_ISA
}  // namespace cast
