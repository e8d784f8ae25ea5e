// The linear whose weights keep n of 64 (linear64.h) in portable C++, compiled once per ISA with
// that ISA's flags.
//
// A tile becomes dense floats in its own order, eight at a time: the next eight kept weights are
// permuted by a table look-up with the mask's byte, which is one instruction of AVX2. Then up to 32
// tokens are multiplied with it: x is repeated to eight lanes, so that a step's columns meet theirs
// in each row, and a row's sum is that of as many lanes as a step has columns.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "elements.h"
#include "linear64.h"

namespace cast {
namespace CAST_ISA {

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

constexpr int64_t kBlockTokens64 = 32;  // that share an expanded tile
constexpr int64_t kMostTileWeights = kTileRows64 * kInt8TileColumns;
constexpr int64_t kMostVectors = 8;  // of a step

// Eight bits -> for each bit how many are set below it.
struct Places {
  alignas(32) int32_t of[256][8];
};
constexpr Places make_places() {
  Places places = {};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, next = 0; i < 8; ++i) {
      places.of[mask][i] = next;
      next += mask >> i & 1;
    }
  return places;
}
constexpr Places kPlaces = make_places();

inline int64_t step_columns64(const Linear& p) {
  return p.has_integers() ? 4 : p.dtype == DType::kFloat32 ? 1 : 2;
}

inline Eight spread(Eight kept, uint8_t mask) {
  EightInts places;
  std::memcpy(&places, kPlaces.of[mask], sizeof(places));
  const EightInts bits = {1, 2, 4, 8, 16, 32, 64, 128};
  const EightInts is_kept = ((EightInts{} + mask) & bits) != 0;
  const Eight moved = __builtin_shuffle(kept, places);
  return (Eight)((EightInts)moved & is_kept);
}

// Eight kept weights from the i-th on -> floats; near a tile's end the last of them are its masks.
inline Eight load_eight(const float* from) {
  Eight floats;
  std::memcpy(&floats, from, sizeof(floats));
  return floats;
}
inline Eight load_eight(const BFloat16* from) {
  typedef uint16_t Words __attribute__((vector_size(16)));
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return (Eight)(__builtin_convertvector(words, EightInts) << 16);
}
inline Eight load_eight(const _Float16* from) {
  Eight floats;
  for (int i = 0; i < 8; ++i) {
    _Float16 half;
    std::memcpy(&half, from + i, 2);
    floats[i] = static_cast<float>(half);
  }
  return floats;
}
typedef uint8_t EightBytes __attribute__((vector_size(8)));
inline EightBytes load_bytes(const uint8_t* from) {
  EightBytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bytes;
}
typedef int8_t EightSigned __attribute__((vector_size(8)));
// GCC 12 takes bytes apart one by one unless an operation on all eight comes before they are
// widened.
inline EightInts widened(EightBytes bytes) { return __builtin_convertvector(bytes, EightInts); }
inline EightInts less_128(EightBytes bytes) {
  return __builtin_convertvector((EightSigned)(bytes ^ 128), EightInts);
}
inline Eight to_floats(EightInts integers) { return __builtin_convertvector(integers, Eight); }

// `weights` of a tile, a mask's bit each; load(i) is the eight kept ones from the i-th on.
template <typename Load>
void spread_all(const uint8_t* masks, int64_t weights, const Load& load, float* dense) {
  for (int64_t next = 0, i = 0; i < weights / 8; ++i) {
    const Eight eight = spread(load(next), masks[i]);
    std::memcpy(dense + i * 8, &eight, sizeof(eight));
    next += __builtin_popcount(masks[i]);
  }
}

// A tile -> its weights as floats, 4-bit ones without their scales. T: of those that are no
// integers.
template <typename T>
void expand_tile64(const Linear& p, const uint8_t* tile, float* dense) {
  const uint8_t* masks = masks64(p, tile);
  const int64_t weights = kTileRows64 * tile_columns64(p), half = weights / 2;
  if (p.scale_group != 0) {
    const auto low = [&](int64_t i) { return to_floats(widened(load_bytes(tile + i) & 15) - 8); };
    const auto high = [&](int64_t i) {
      return to_floats((widened(load_bytes(tile + i) & 240) >> 4) - 8);
    };
    spread_all(masks, half, low, dense);
    spread_all(masks + half / 8, half, high, dense + half);
  } else if (p.scale != nullptr) {
    const auto load = [&](int64_t i) { return to_floats(less_128(load_bytes(tile + i))); };
    spread_all(masks, weights, load, dense);
  } else {
    const T* values = reinterpret_cast<const T*>(tile);
    spread_all(masks, weights, [&](int64_t i) { return load_eight(values + i); }, dense);
  }
}

inline float scale64(const Linear& p, const uint8_t* tile, int64_t group, int64_t row) {
  BFloat16 scale;
  std::memcpy(&scale, tile + scales_at64(p) + (group * kTileRows64 + row) * 2, 2);
  return to_float(scale);
}

// Whether all of x is finite, or it is quantised; from kXAt on [token][step][8]: x's columns of the
// step, again and again; then the scales of quantised ones, [token][tile].
constexpr int64_t kXAt = 16;  // floats
inline int64_t steps64(const Linear& p) { return p.padded_in_features() / step_columns64(p); }

inline int64_t workspace_bytes64(const Linear& p) {
  return (kXAt + p.num_tokens * (steps64(p) * 8 + num_tiles64(p))) * sizeof(float);
}

inline bool is_finite(float value) { return std::fabs(value) <= std::numeric_limits<float>::max(); }

template <typename T>
void prepare64_of(const Linear& p, float* workspace) {
  const int64_t columns = tile_columns64(p), step = step_columns64(p);
  float* to = workspace + kXAt;
  float* scales = to + p.num_tokens * steps64(p) * 8;
  bool is_all_finite = true;
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    for (int64_t first = 0; first < p.padded_in_features(); first += columns) {
      const int64_t inside = std::min(p.in_features - first, columns);
      float of_tile[kInt8TileColumns] = {};
      if (p.has_integers()) {
        *scales++ = quantize_group(x + first, inside, 0.0f, of_tile);
      } else {
        for (int64_t k = 0; k < inside; ++k) {
          of_tile[k] = to_float(x[first + k]);
          if (!is_finite(of_tile[k])) of_tile[k] = 0.0f, is_all_finite = false;
        }
      }
      for (int64_t k = 0; k < columns; k += step, to += 8)
        for (int64_t i = 0; i < 8; ++i) to[i] = of_tile[k + i % step];
    }
  }
  *workspace = is_all_finite ? 1.0f : 0.0f;
}

// Each lane becomes the sum of the kStep lanes of its row.
template <int kStep>
Eight sums_of_rows(Eight lanes) {
  if (kStep >= 2) lanes += __builtin_shuffle(lanes, EightInts{1, 0, 3, 2, 5, 4, 7, 6});
  if (kStep == 4) lanes += __builtin_shuffle(lanes, EightInts{2, 3, 0, 1, 6, 7, 4, 5});
  return lanes;
}

// kStep: columns of a step; kGroups: scale groups of a tile of 4-bit weights, else 1.
template <typename T, int kStep, int kGroups>
void run64_of(const Linear& p, const float* workspace, int64_t begin, int64_t end) {
  constexpr int kVectors = kTileRows64 * kStep / 8;
  const int64_t num_tiles = num_tiles64(p), tile_bytes = tile_bytes64(p);
  const int64_t group_steps = tile_columns64(p) / kStep / kGroups;
  const float* all_x = workspace + kXAt;
  const float* scales = all_x + p.num_tokens * steps64(p) * 8;
  alignas(64) float dense[kMostTileWeights];
  for (int64_t first = 0; first < p.num_tokens; first += kBlockTokens64) {
    const int64_t tokens = std::min(p.num_tokens - first, kBlockTokens64);
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      Eight sums[kBlockTokens64][kVectors] = {};
      for (int64_t i = 0; i < num_tiles; ++i) {
        const uint8_t* tile = p.packed + (tile_row * num_tiles + i) * tile_bytes;
        expand_tile64<T>(p, tile, dense);
        Eight of_rows[kGroups][kVectors] = {};
        if (p.scale_group != 0)
          for (int group = 0; group < kGroups; ++group)
            for (int64_t row = 0; row < kTileRows64; ++row)
              for (int j = 0; j < kStep; ++j)
                of_rows[group][row * kStep / 8][(row * kStep + j) % 8] =
                    scale64(p, tile, group, row);
        for (int64_t token = 0; token < tokens; ++token) {
          const float scale = p.has_integers() ? scales[(first + token) * num_tiles + i] : 1.0f;
          const float* x = all_x + ((first + token) * num_tiles + i) * kGroups * group_steps * 8;
          for (int group = 0; group < kGroups; ++group) {
            Eight dots[kVectors] = {};
            for (int64_t step = group * group_steps; step < (group + 1) * group_steps; ++step) {
              const Eight of_token = load_eight(x + step * 8);
              for (int j = 0; j < kVectors; ++j)
                dots[j] += load_eight(dense + (step * kVectors + j) * 8) * of_token;
            }
            for (int j = 0; j < kVectors; ++j) {
              if (p.scale_group != 0)
                sums[token][j] += sums_of_rows<kStep>(dots[j]) * (scale * of_rows[group][j]);
              else if (p.scale != nullptr)
                sums[token][j] += sums_of_rows<kStep>(dots[j]) * scale;
              else
                sums[token][j] += dots[j];
            }
          }
        }
      }
      const int64_t n = tile_row * kTileRows64;
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t row = 0; row < std::min(p.out_features - n, kTileRows64); ++row) {
          Eight lanes = sums[token][row * kStep / 8];
          if (!p.has_integers()) lanes = sums_of_rows<kStep>(lanes);
          float sum = lanes[row * kStep % 8];
          if (p.scale != nullptr) sum *= p.scale[n + row];
          T* out = static_cast<T*>(p.out) + (first + token) * p.out_features + n + row;
          from_float(sum + (p.bias != nullptr ? p.bias[n + row] : 0.0f), out);
        }
    }
  }
  if (*workspace == 0.0f) add_not_finite64(p, begin, end);
}

inline void prepare64(const Linear& p, void* workspace) {
  float* x = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return prepare64_of<BFloat16>(p, x);
    case DType::kFloat16:
      return prepare64_of<_Float16>(p, x);
    case DType::kFloat32:
      return prepare64_of<float>(p, x);
  }
}

template <typename T>
void run64_any(const Linear& p, const float* x, int64_t begin, int64_t end) {
  if (!p.has_integers()) return run64_of<T, 4 / sizeof(T), 1>(p, x, begin, end);
  if (p.scale_group == 64) return run64_of<T, 4, 2>(p, x, begin, end);
  if (p.scale_group == 32) return run64_of<T, 4, 4>(p, x, begin, end);
  return run64_of<T, 4, 1>(p, x, begin, end);
}

inline void run64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  const float* x = static_cast<const float*>(workspace);
  switch (p.dtype) {
    case DType::kBFloat16:
      return run64_any<BFloat16>(p, x, begin, end);
    case DType::kFloat16:
      return run64_any<_Float16>(p, x, begin, end);
    case DType::kFloat32:
      return run64_any<float>(p, x, begin, end);
  }
}

constexpr Product kLinear64 = {workspace_bytes64, prepare64, run64};

// For expansion.h: tile rows [begin, end) -> [16 * (end - begin)][padded_in_features()]; 4-bit
// weights times their scales. T: of weights that are no integers.
template <typename T, typename To>
void expand_rows64(const Linear& p, int64_t begin, int64_t end, To* rows) {
  const int64_t columns = p.padded_in_features(), num_tiles = num_tiles64(p);
  const int64_t tile_columns = tile_columns64(p), step = step_columns64(p);
  alignas(64) float dense[kMostTileWeights];
  for (int64_t tile_row = begin; tile_row < end; ++tile_row, rows += kTileRows64 * columns)
    for (int64_t i = 0; i < num_tiles; ++i) {
      const uint8_t* tile = p.packed + (tile_row * num_tiles + i) * tile_bytes64(p);
      expand_tile64<T>(p, tile, dense);
      for (int64_t row = 0; row < kTileRows64; ++row)
        for (int64_t k = 0; k < tile_columns; ++k) {
          float weight = dense[(k / step * kTileRows64 + row) * step + k % step];
          if (p.scale_group != 0) weight *= scale64(p, tile, k / p.scale_group, row);
          from_float(weight, rows + row * columns + i * tile_columns + k);
        }
    }
}

}  // namespace CAST_ISA
}  // namespace cast
