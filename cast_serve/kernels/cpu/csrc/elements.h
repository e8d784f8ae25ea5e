// The elements of x: their conversions, and the quantising of a scale group. Compiled once per ISA:
// the including file defines CAST_ISA (generic.h).
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

}  // namespace CAST_ISA
}  // namespace cast
