// The elements of x: their conversions, and the quantising of a scale group; and 4-bit weights.
// Compiled once per ISA: the including file defines CAST_ISA (generic.h).
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "linear24.h"

namespace cast {
namespace CAST_ISA {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(_Float16 value) { return static_cast<float>(value); }
inline float to_float(float value) { return value; }

inline void from_float(float value, BFloat16* out) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out->bits = value != value ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
inline void from_float(float value, _Float16* out) { *out = static_cast<_Float16>(value); }
inline void from_float(float value, float* out) { *out = value; }

// Quantises a scale group of x, of which `columns` lie inside in_features, to
// [kInt8TileColumns] integers, to each of which `zero` is added, and returns the scale. It is
// reference.quantize_groups bit for bit, and no more than what a compiler can turn into vectors.
template <typename T, typename Integer>
float quantize_group(const T* x, int64_t columns, Integer zero, Integer* integers) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  float group[kInt8TileColumns];
  if (columns == kInt8TileColumns) {  // a loop of known length becomes plain vector code
    for (int64_t i = 0; i < kInt8TileColumns; ++i) group[i] = to_float(x[i]);
  } else {
    for (int64_t i = 0; i < columns; ++i) group[i] = to_float(x[i]);
    for (int64_t i = columns; i < kInt8TileColumns; ++i) group[i] = 0.0f;
  }

  uint32_t bits[kInt8TileColumns];
  std::memcpy(bits, group, sizeof(bits));
  uint32_t largest_bits = 0;  // without its sign a float is ordered as its bits, NaN above Inf
  for (int64_t i = 0; i < kInt8TileColumns; ++i)
    largest_bits = std::max(largest_bits, bits[i] & 0x7FFFFFFF);
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  const bool is_finite = largest_bits < 0x7F800000;
  const float scale = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!(scale > 0)) {
    for (int64_t i = 0; i < kInt8TileColumns; ++i) integers[i] = zero;
    return scale;
  }
  for (int64_t i = 0; i < kInt8TileColumns; ++i) {
    float value = group[i] / scale;
    value = value < -127.0f ? -127.0f : value;
    value = value > 127.0f ? 127.0f : value;
    value = (value + kToInteger) - kToInteger;
    integers[i] = static_cast<Integer>(static_cast<int32_t>(value) + static_cast<int32_t>(zero));
  }
  return scale;
}

// A row of a tile of 4-bit weights -> its kept values, in order.
inline void int4_values(const uint8_t* pairs, int8_t* values) {
  for (int64_t a = 0; a < 4; ++a)
    for (int64_t c = 0; c < 2; ++c)
      for (int64_t d = 0; d < 4; ++d) {
        const uint8_t both = pairs[16 * c + 4 * a + d];
        int8_t* low = values + 16 * a + 4 * c + d;
        low[0] = static_cast<int8_t>(static_cast<int8_t>(both << 4) >> 4);
        low[8] = static_cast<int8_t>(static_cast<int8_t>(both) >> 4);
      }
}

// A scale of a tile of 4-bit weights, which has `groups` for each row.
inline float int4_scale(const uint8_t* tile, int64_t groups, int64_t row, int64_t group) {
  BFloat16 scale;
  std::memcpy(&scale, tile + kInt4ScalesAt + (row * groups + group) * 2, 2);
  return to_float(scale);
}

}  // namespace CAST_ISA
}  // namespace cast
