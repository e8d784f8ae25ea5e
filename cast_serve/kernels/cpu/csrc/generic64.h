// The linear whose weights keep n of 64 (linear64.h) in portable C++, compiled once per ISA with
// that ISA's flags: a tile becomes floats, which some tokens are multiplied with, rows in lanes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"
#include "linear64.h"

namespace cast {
namespace CAST_ISA {

constexpr int64_t kBlockTokens64 = 32;  // that share an expanded tile

struct DenseTile {
  alignas(64) float weights[kInt8TileColumns][kTileRows64];
  uint16_t masks[kInt8TileColumns];  // of a column, a bit for each row
};

// Columns [begin, end) of a tile; value(i) is the i-th kept weight of these.
template <typename Value>
void expand_columns64(const uint8_t* masks, int64_t begin, int64_t end, int64_t step_columns,
                      const Value& value, DenseTile* tile) {
  int64_t bit = begin * kTileRows64, next = 0;
  for (int64_t step = begin; step < end; step += step_columns) {
    for (int64_t i = 0; i < step_columns; ++i) tile->masks[step + i] = 0;
    for (int64_t row = 0; row < kTileRows64; ++row)
      for (int64_t i = 0; i < step_columns; ++i, ++bit) {
        const bool is_kept = masks[bit / 8] >> bit % 8 & 1;
        tile->weights[step + i][row] = is_kept ? value(next) : 0.0f;
        tile->masks[step + i] |= static_cast<uint16_t>(is_kept << row);
        next += is_kept;
      }
  }
}

// T: of weights that are no integers.
template <typename T>
void expand_tile64(const Linear24& p, const uint8_t* tile, DenseTile* dense) {
  const uint8_t* masks = tile + values_bytes64(p);
  if (p.scale_group != 0) {
    const auto low = [&](int64_t i) { return static_cast<float>((tile[i] & 15) - 8); };
    const auto high = [&](int64_t i) { return static_cast<float>((tile[i] >> 4) - 8); };
    expand_columns64(masks, 0, 64, 4, low, dense);
    expand_columns64(masks, 64, 128, 4, high, dense);
  } else if (p.scale != nullptr) {
    const auto value = [&](int64_t i) { return static_cast<float>(tile[i] - 128); };
    expand_columns64(masks, 0, kInt8TileColumns, 4, value, dense);
  } else {
    const auto value = [&](int64_t i) {
      T kept;
      std::memcpy(&kept, tile + i * sizeof(T), sizeof(T));
      return to_float(kept);
    };
    expand_columns64(masks, 0, kTileColumns, 4 / sizeof(T), value, dense);
  }
}

inline float scale64(const Linear24& p, const uint8_t* tile, int64_t group, int64_t row) {
  BFloat16 scale;
  std::memcpy(&scale, tile + scales_at64(p) + (group * kTileRows64 + row) * 2, 2);
  return to_float(scale);
}

// [token][K padded to tiles] as floats, of integer weights quantised; then the scales,
// [token][tile].
inline int64_t workspace_bytes64(const Linear24& p) {
  const int64_t scales = p.has_integers() ? num_tiles64(p) : 0;
  return p.num_tokens * (p.padded_in_features() + scales) * sizeof(float);
}

template <typename T>
void prepare64_of(const Linear24& p, float* rows) {
  const int64_t columns = p.padded_in_features();
  float* scales = rows + p.num_tokens * columns;
  for (int64_t token = 0; token < p.num_tokens; ++token, rows += columns) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    if (p.has_integers()) {
      for (int64_t first = 0; first < columns; first += kInt8TileColumns)
        *scales++ = quantize_group(x + first, std::min(p.in_features - first, kInt8TileColumns),
                                   0.0f, rows + first);
    } else {
      for (int64_t k = 0; k < p.in_features; ++k) rows[k] = to_float(x[k]);
      std::fill(rows + p.in_features, rows + columns, 0.0f);
    }
  }
}

// dots += x times the columns [begin, end) of a tile. A dropped weight is not multiplied, which
// shows where x is Inf or NaN.
inline void add_dots64(const DenseTile& tile, const float* x, int64_t begin, int64_t end,
                       float (&dots)[kTileRows64]) {
  for (int64_t column = begin; column < end; ++column) {
    const float of_token = x[column];
    if (std::fabs(of_token) <= std::numeric_limits<float>::max()) {
      for (int64_t row = 0; row < kTileRows64; ++row)
        dots[row] += tile.weights[column][row] * of_token;
    } else {
      for (int64_t row = 0; row < kTileRows64; ++row)
        if (tile.masks[column] >> row & 1) dots[row] += tile.weights[column][row] * of_token;
    }
  }
}

template <typename T>
void run64_of(const Linear24& p, const float* rows, int64_t begin, int64_t end) {
  const int64_t columns = p.padded_in_features(), num_tiles = num_tiles64(p);
  const int64_t tile_columns = tile_columns64(p);
  const int64_t groups = p.scale_group != 0 ? p.num_scale_groups() : 1;
  const float* scales = rows + p.num_tokens * columns;
  DenseTile dense;
  for (int64_t first = 0; first < p.num_tokens; first += kBlockTokens64) {
    const int64_t tokens = std::min(p.num_tokens - first, kBlockTokens64);
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      float sums[kBlockTokens64][kTileRows64] = {};
      for (int64_t i = 0; i < num_tiles; ++i) {
        const uint8_t* tile = p.packed + (tile_row * num_tiles + i) * tile_bytes64(p);
        expand_tile64<T>(p, tile, &dense);
        for (int64_t token = 0; token < tokens; ++token) {
          const float* x = rows + (first + token) * columns + i * tile_columns;
          const float scale = p.has_integers() ? scales[(first + token) * num_tiles + i] : 1.0f;
          for (int64_t group = 0; group < groups; ++group) {
            float dots[kTileRows64] = {};
            add_dots64(dense, x, group * tile_columns / groups, (group + 1) * tile_columns / groups,
                       dots);
            for (int64_t row = 0; row < kTileRows64; ++row)
              sums[token][row] +=
                  dots[row] * (p.scale_group != 0 ? scale * scale64(p, tile, group, row) : scale);
          }
        }
      }
      const int64_t n = tile_row * kTileRows64;
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t row = 0; row < std::min(p.out_features - n, kTileRows64); ++row) {
          const float sum = sums[token][row] * (p.scale != nullptr ? p.scale[n + row] : 1.0f);
          T* out = static_cast<T*>(p.out) + (first + token) * p.out_features + n + row;
          from_float(sum + (p.bias != nullptr ? p.bias[n + row] : 0.0f), out);
        }
    }
  }
}

inline void prepare64(const Linear24& p, void* workspace) {
  float* rows = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return prepare64_of<BFloat16>(p, rows);
    case DType::kFloat16:
      return prepare64_of<_Float16>(p, rows);
    case DType::kFloat32:
      return prepare64_of<float>(p, rows);
  }
}

inline void run64(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  const float* rows = static_cast<const float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return run64_of<BFloat16>(p, rows, begin, end);
    case DType::kFloat16:
      return run64_of<_Float16>(p, rows, begin, end);
    case DType::kFloat32:
      return run64_of<float>(p, rows, begin, end);
  }
}

constexpr Product kLinear64 = {workspace_bytes64, prepare64, run64};

// For expansion.h: tile rows [begin, end) -> [16 * (end - begin)][padded_in_features()]; 4-bit
// weights times their scales. T: of weights that are no integers.
template <typename T, typename To>
void expand_rows64(const Linear24& p, int64_t begin, int64_t end, To* rows) {
  const int64_t columns = p.padded_in_features(), num_tiles = num_tiles64(p);
  const int64_t tile_columns = tile_columns64(p);
  DenseTile dense;
  for (int64_t tile_row = begin; tile_row < end; ++tile_row, rows += kTileRows64 * columns)
    for (int64_t i = 0; i < num_tiles; ++i) {
      const uint8_t* tile = p.packed + (tile_row * num_tiles + i) * tile_bytes64(p);
      expand_tile64<T>(p, tile, &dense);
      for (int64_t row = 0; row < kTileRows64; ++row)
        for (int64_t column = 0; column < tile_columns; ++column) {
          float weight = dense.weights[column][row];
          if (p.scale_group != 0) weight *= scale64(p, tile, column / p.scale_group, row);
          from_float(weight, rows + row * columns + i * tile_columns + column);
        }
    }
}

}  // namespace CAST_ISA
}  // namespace cast
