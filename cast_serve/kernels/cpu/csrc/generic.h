// The 2:4 linear in portable C++, compiled once per ISA with that ISA's flags.
//
// x becomes float and is transposed to [token block][K][CAST_LANES tokens]; then one kept weight
// is one multiply-add over a vector of tokens, and a dropped weight costs nothing. A single token
// is computed with scalars instead. The including file defines CAST_ISA (a namespace, so that no
// two ISAs share a symbol) and CAST_LANES (tokens in a vector).
#pragma once
#include <cstring>

#include "elements.h"
#include "linear24.h"

namespace cast {
namespace CAST_ISA {

typedef float Lanes __attribute__((vector_size(4 * CAST_LANES)));

template <typename T>
void prepare(const Linear& p, float* workspace) {
  const int64_t lanes = p.num_tokens == 1 ? 1 : CAST_LANES;
  const int64_t padded_k = p.num_tile_columns() * kTileColumns;
  for (int64_t block = 0; block * lanes < p.num_tokens; ++block) {
    float* rows = workspace + block * padded_k * lanes;
    std::memset(rows, 0, padded_k * lanes * sizeof(float));
    for (int64_t lane = 0; lane < lanes && block * lanes + lane < p.num_tokens; ++lane) {
      const T* x = static_cast<const T*>(p.x) + (block * lanes + lane) * p.x_stride;
      for (int64_t k = 0; k < p.in_features; ++k) rows[k * lanes + lane] = to_float(x[k]);
    }
  }
}

template <typename V, typename T>
void tile_row(const uint8_t* tiles, int64_t num_tiles, const float* x, V (&sums)[kTileRows]) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t row = 0; row < kTileRows; ++row) sums[row] = V{};
  for (int64_t tile = 0; tile < num_tiles; ++tile, x += kTileColumns * lanes) {
    const T* values = reinterpret_cast<const T*>(tiles);
    const uint8_t* positions = tiles + kTileRows * kTileKept * sizeof(T);
    tiles = positions + kTileRows * 8;
    for (int64_t group = 0; group < kTileColumns / 4; ++group) {
      const V* columns = reinterpret_cast<const V*>(x + group * 4 * lanes);
      for (int64_t row = 0; row < kTileRows; ++row) {
        const int both = positions[row * 8 + group / 2] >> (group % 2 * 4);
        const T* kept = values + row * kTileKept + group * 2;
        sums[row] +=
            columns[both & 3] * to_float(kept[0]) + columns[both >> 2 & 3] * to_float(kept[1]);
      }
    }
  }
}

template <typename V, typename T>
void run(const Linear& p, const float* workspace, int64_t begin, int64_t end) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  const int64_t num_tiles = p.num_tile_columns();
  const int64_t tile_bytes = kTileRows * (kTileKept * sizeof(T) + 8);
  for (int64_t first = 0; first < p.num_tokens; first += lanes) {
    const float* x = workspace + first * num_tiles * kTileColumns;
    const int64_t tokens = p.num_tokens - first < lanes ? p.num_tokens - first : lanes;
    for (int64_t tile = begin; tile < end; ++tile) {
      V sums[kTileRows];
      tile_row<V, T>(p.packed + tile * num_tiles * tile_bytes, num_tiles, x, sums);
      for (int64_t row = 0; row < kTileRows && tile * kTileRows + row < p.out_features; ++row) {
        const int64_t n = tile * kTileRows + row;
        float lane_sums[lanes];
        std::memcpy(lane_sums, &sums[row], sizeof(V));
        for (int64_t token = 0; token < tokens; ++token) {
          T* out = static_cast<T*>(p.out) + (first + token) * p.out_features + n;
          from_float(lane_sums[token] + (p.bias ? p.bias[n] : 0.0f), out);
        }
      }
    }
  }
}

inline int64_t workspace_bytes_of(const Linear& p) {
  const int64_t lanes = p.num_tokens == 1 ? 1 : CAST_LANES;
  const int64_t padded_m = (p.num_tokens + lanes - 1) / lanes * lanes;
  return padded_m * p.num_tile_columns() * kTileColumns * sizeof(float);
}

inline void prepare_any(const Linear& p, void* workspace) {
  float* rows = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return prepare<BFloat16>(p, rows);
    case DType::kFloat16:
      return prepare<_Float16>(p, rows);
    case DType::kFloat32:
      return prepare<float>(p, rows);
  }
}

template <typename T>
void run_any_tokens(const Linear& p, const float* rows, int64_t begin, int64_t end) {
  return p.num_tokens == 1 ? run<float, T>(p, rows, begin, end)
                           : run<Lanes, T>(p, rows, begin, end);
}

inline void run_any(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  const float* rows = static_cast<const float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return run_any_tokens<BFloat16>(p, rows, begin, end);
    case DType::kFloat16:
      return run_any_tokens<_Float16>(p, rows, begin, end);
    case DType::kFloat32:
      return run_any_tokens<float>(p, rows, begin, end);
  }
}

constexpr Product kLinear24 = {workspace_bytes_of, prepare_any, run_any};

}  // namespace CAST_ISA
}  // namespace cast
