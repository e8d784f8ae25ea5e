// Packed tiles -> dense rows, and x -> floats, for the dense product of a library (library.h).
// Compiled once per ISA with that ISA's flags: the including file defines CAST_ISA (generic.h).
#pragma once
#include <algorithm>

#include "elements.h"
#include "generic64.h"
#include "linear24.h"

namespace cast {
namespace CAST_ISA {

inline void convert(BFloat16 value, BFloat16* to) { *to = value; }
inline void convert(int8_t value, float* to) { *to = value; }
template <typename T>
void convert(T value, float* to) {
  *to = to_float(value);
}

// The kept weights of a row of a tile, and `columns` / 8 bytes of positions -> `columns` weights.
template <int64_t columns, typename T, typename To>
void expand_row(const T* kept, const uint8_t* positions, To* to) {
  for (int64_t pair = 0; pair < columns / 8; ++pair, kept += 4, to += 8) {
    for (int64_t i = 0; i < 8; ++i) to[i] = To{};
    const int both = positions[pair];  // of two groups
    convert(kept[0], &to[both & 3]);
    convert(kept[1], &to[both >> 2 & 3]);
    convert(kept[2], &to[4 + (both >> 4 & 3)]);
    convert(kept[3], &to[4 + (both >> 6)]);
  }
}

// Tile rows [begin, end) -> [8 * (end - begin)][padded_in_features()].
template <typename T, typename To>
void expand_rows(const Linear& p, int64_t begin, int64_t end, To* rows) {
  constexpr int64_t columns = sizeof(T) == 1 ? kInt8TileColumns : kTileColumns;
  constexpr int64_t row_bytes = columns / 2 * sizeof(T);
  const int64_t row_tiles = p.padded_in_features() / columns;
  const uint8_t* tile = p.packed + begin * row_tiles * kTileRows * (row_bytes + columns / 8);
  for (int64_t tile_row = begin; tile_row < end;
       ++tile_row, rows += kTileRows * row_tiles * columns)
    for (int64_t column = 0; column < row_tiles * columns; column += columns) {
      const uint8_t* positions = tile + kTileRows * row_bytes;
      for (int64_t row = 0; row < kTileRows; ++row)
        expand_row<columns>(reinterpret_cast<const T*>(tile + row * row_bytes),
                            positions + row * columns / 8,
                            rows + row * row_tiles * columns + column);
      tile = positions + kTileRows * columns / 8;
    }
}

// 4-bit weights, times their scales, which fp32 holds exactly.
inline void expand_int4_rows(const Linear& p, int64_t begin, int64_t end, float* rows) {
  const int64_t row_tiles = p.num_int8_tile_columns(), groups = p.num_scale_groups();
  const int64_t columns = p.padded_in_features();
  const uint8_t* tile = p.packed + begin * row_tiles * p.int4_tile_bytes();
  for (; begin < end; ++begin, rows += kTileRows * columns)
    for (int64_t first = 0; first < columns; first += kInt8TileColumns, tile += p.int4_tile_bytes())
      for (int64_t row = 0; row < kTileRows; ++row) {
        int8_t values[kInt8TileKept];
        int4_values(tile + row * kInt4RowBytes, values);
        float* to = rows + row * columns + first;
        expand_row<kInt8TileColumns>(values, tile + kInt4PositionsAt + row * kInt8TileColumns / 8,
                                     to);
        for (int64_t i = 0; i < kInt8TileColumns; ++i)
          to[i] *= int4_scale(tile, groups, row, i / p.scale_group);
      }
}

inline void expand_to_float(const Linear& p, int64_t begin, int64_t end, float* rows) {
  if (p.kept != 0) {
    if (p.dtype == DType::kBFloat16) return expand_rows64<BFloat16>(p, begin, end, rows);
    if (p.dtype == DType::kFloat16) return expand_rows64<_Float16>(p, begin, end, rows);
    return expand_rows64<float>(p, begin, end, rows);
  }
  if (p.scale_group != 0) return expand_int4_rows(p, begin, end, rows);
  if (p.scale != nullptr) return expand_rows<int8_t>(p, begin, end, rows);
  switch (p.dtype) {
    case DType::kBFloat16:
      return expand_rows<BFloat16>(p, begin, end, rows);
    case DType::kFloat16:
      return expand_rows<_Float16>(p, begin, end, rows);
    case DType::kFloat32:
      return expand_rows<float>(p, begin, end, rows);
  }
}

inline void expand_bf16(const Linear& p, int64_t begin, int64_t end, void* rows) {
  BFloat16* to = static_cast<BFloat16*>(rows);
  if (p.kept != 0) return expand_rows64<BFloat16>(p, begin, end, to);
  return expand_rows<BFloat16>(p, begin, end, to);
}

template <typename T>
void rounded_x_of(const Linear& p, float* to) {
  for (int64_t token = 0; token < p.num_tokens; ++token)
    for (int64_t first = 0; first < p.in_features; first += kInt8TileColumns) {
      const T* x = static_cast<const T*>(p.x) + token * p.x_stride + first;
      const int64_t columns = std::min(p.in_features - first, kInt8TileColumns);
      const float scale = quantize_group(x, columns, 0.0f, to);
      for (int64_t i = 0; i < kInt8TileColumns; ++i) to[i] *= scale;
      to += kInt8TileColumns;
    }
}

inline void rounded_x(const Linear& p, float* to) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return rounded_x_of<BFloat16>(p, to);
    case DType::kFloat16:
      return rounded_x_of<_Float16>(p, to);
    case DType::kFloat32:
      return rounded_x_of<float>(p, to);
  }
}

constexpr Expansion kExpansion = {expand_to_float, expand_bf16, rounded_x};

}  // namespace CAST_ISA
}  // namespace cast
