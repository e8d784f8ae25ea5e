// The linear with int8 weights, 2:4 or dense, in portable C++, compiled once per ISA with that
// ISA's flags.
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

inline int64_t int8_lanes(const Linear24& p) { return p.num_tokens == 1 ? 1 : CAST_LANES; }

inline int64_t int8_padded_tokens(const Linear24& p) {
  const int64_t lanes = int8_lanes(p);
  return (p.num_tokens + lanes - 1) / lanes * lanes;
}

inline int64_t workspace_bytes_int8(const Linear24& p) {
  const int64_t floats_of_token = p.num_int8_tile_columns() * (kInt8TileColumns + 1);
  return int8_padded_tokens(p) * floats_of_token * sizeof(float);
}

inline int64_t scales_offset(const Linear24& p) {  // in floats
  return int8_padded_tokens(p) * p.num_int8_tile_columns() * kInt8TileColumns;
}

template <typename T>
void prepare_int8(const Linear24& p, float* integers) {
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

template <typename V>
void add_int8_tile(const uint8_t* tile, const float* x, V scale, V (&sums)[kTileRows]) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  const int8_t* values = reinterpret_cast<const int8_t*>(tile);
  const uint8_t* positions = tile + kTileRows * kInt8TileKept;
  V dots[kTileRows] = {};
  for (int64_t group = 0; group < kInt8TileColumns / 4; ++group) {
    const V* columns = reinterpret_cast<const V*>(x + group * 4 * lanes);
    for (int64_t row = 0; row < kTileRows; ++row) {
      const int both = positions[row * (kInt8TileColumns / 8) + group / 2] >> (group % 2 * 4);
      const int8_t* kept = values + row * kInt8TileKept + group * 2;
      dots[row] += columns[both & 3] * static_cast<float>(kept[0]) +
                   columns[both >> 2 & 3] * static_cast<float>(kept[1]);
    }
  }
  for (int64_t row = 0; row < kTileRows; ++row) sums[row] += dots[row] * scale;
}

template <typename V, typename T, bool kIsDense>
void run_int8(const Linear24& p, const float* integers, int64_t begin, int64_t end) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  const int64_t groups = p.num_int8_tile_columns();
  const float* scales = integers + scales_offset(p);
  for (int64_t first = 0; first < p.num_tokens; first += lanes) {
    const V* block_scales = reinterpret_cast<const V*>(scales + first * groups);
    const float* x = integers + first * groups * kInt8TileColumns;
    const int64_t tokens = std::min(p.num_tokens - first, lanes);
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      V sums[kTileRows] = {};
      for (int64_t group = 0; group < groups; ++group) {
        constexpr int64_t tile_bytes = kIsDense ? kDenseInt8TileBytes : kInt8TileBytes;
        const uint8_t* tile = p.packed + (tile_row * groups + group) * tile_bytes;
        const float* columns = x + group * kInt8TileColumns * lanes;
        if constexpr (kIsDense)
          add_dense_int8_tile<V>(tile, columns, block_scales[group], sums);
        else
          add_int8_tile<V>(tile, columns, block_scales[group], sums);
      }
      for (int64_t row = 0; row < kTileRows && tile_row * kTileRows + row < p.out_features; ++row) {
        const int64_t n = tile_row * kTileRows + row;
        float lane_sums[lanes];
        std::memcpy(lane_sums, &sums[row], sizeof(V));
        for (int64_t token = 0; token < tokens; ++token) {
          T* out = static_cast<T*>(p.out) + (first + token) * p.out_features + n;
          from_float(lane_sums[token] * p.scale[n] + (p.bias ? p.bias[n] : 0.0f), out);
        }
      }
    }
  }
}

inline void prepare_int8_any(const Linear24& p, void* workspace) {
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

template <typename T, bool kIsDense>
void run_int8_any_tokens(const Linear24& p, const float* integers, int64_t begin, int64_t end) {
  return p.num_tokens == 1 ? run_int8<float, T, kIsDense>(p, integers, begin, end)
                           : run_int8<Lanes, T, kIsDense>(p, integers, begin, end);
}

template <bool kIsDense>
void run_int8_any(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  const float* integers = static_cast<const float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return run_int8_any_tokens<BFloat16, kIsDense>(p, integers, begin, end);
    case DType::kFloat16:
      return run_int8_any_tokens<_Float16, kIsDense>(p, integers, begin, end);
    case DType::kFloat32:
      return run_int8_any_tokens<float, kIsDense>(p, integers, begin, end);
  }
}

constexpr Product kLinear24Int8 = {workspace_bytes_int8, prepare_int8_any, run_int8_any<false>};
constexpr Product kLinearInt8 = {workspace_bytes_int8, prepare_int8_any, run_int8_any<true>};

}  // namespace CAST_ISA
}  // namespace cast
