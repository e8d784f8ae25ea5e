// How avx512vnni.cpp reads x, whatever its dtype.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "avx512_common.h"

namespace cast {
namespace {

constexpr uint8_t kZero = 128;  // is added to an integer of x to make it unsigned

// Sixteen elements -> floats; those outside the mask are 0.
template <DType kDType>
inline __m512 load_16(const void* x, int64_t first, __mmask16 inside) {
  if constexpr (kDType == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(x) + first);
  } else {
    const __m256i halves =
        _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(x) + first);
    if constexpr (kDType == DType::kFloat16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

// Divides by a positive number. A division takes ten times as long as the three instructions that
// correct a product with the reciprocal, after which the quotient is rounded as a division's is
// (P. Markstein, 1990), for all divisors but those whose reciprocal is out of range and those whose
// bits after the point are all ones.
struct Divider {
  __m512 divisor, reciprocal;
  bool is_corrected;

  explicit Divider(float by) : divisor(_mm512_set1_ps(by)), reciprocal(_mm512_set1_ps(1.0f / by)) {
    uint32_t bits;
    std::memcpy(&bits, &by, 4);
    is_corrected = by > 1e-30f && by < 1e30f && (bits & 0x7FFFFF) != 0x7FFFFF;
  }
  __m512 operator()(__m512 value) const {
    if (!is_corrected) return _mm512_div_ps(value, divisor);
    const __m512 quotient = _mm512_mul_ps(value, reciprocal);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, divisor, value), reciprocal, quotient);
  }
};

// What quantize_group of elements.h does, bit for bit, in less time: x[first, first + columns) ->
// integers + kZero, and the scale. Where columns is a constant, all but the last of a row, the
// masks are too.
template <DType kDType>
__attribute__((always_inline)) inline float quantize_group(const void* x, int64_t first,
                                                           int64_t columns, uint8_t* integers) {
  constexpr int kRegisters = kInt8TileColumns / 16;
  __m512 group[kRegisters];
  __m512i largest_bits =
      _mm512_setzero_si512();  // without its sign, a float is ordered as its bits
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; ++i) {
    const int64_t left = std::clamp<int64_t>(columns - i * 16, 0, 16);
    group[i] = load_16<kDType>(x, first + i * 16, static_cast<__mmask16>((1u << left) - 1));
    largest_bits = _mm512_max_epu32(largest_bits, _mm512_and_si512(_mm512_castps_si512(group[i]),
                                                                   _mm512_set1_epi32(0x7FFFFFFF)));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest_bits);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool is_finite = bits < 0x7F800000;
  const float scale = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!(scale > 0)) {
    std::memset(integers, kZero, kInt8TileColumns);
    return scale;
  }
  const Divider divide(scale);
  const __m512 least = _mm512_set1_ps(-127.0f);  // packing takes care of more than 127
  // Packing puts the first four of each register's integers first, then the second four.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i rounded[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rounded[i] = _mm512_cvtps_epi32(_mm512_max_ps(divide(group[half * 4 + i]), least));
    }
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]),
                                             _mm512_packs_epi32(rounded[2], rounded[3]));
    _mm512_storeu_si512(
        integers + half * 64,
        _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8(-128)));
  }
  return scale;
}

template <DType kDType>
inline float quantize_group_of(const Linear& p, int64_t token, int64_t group, uint8_t* integers) {
  const int64_t first = token * p.x_stride + group * kInt8TileColumns;
  const int64_t columns = p.in_features - group * kInt8TileColumns;
  if (columns >= kInt8TileColumns)
    return quantize_group<kDType>(p.x, first, kInt8TileColumns, integers);
  return quantize_group<kDType>(p.x, first, columns, integers);
}

// Quantises a token's scale group `group` to integers + kZero, and returns the scale.
inline float quantize(const Linear& p, int64_t token, int64_t group, uint8_t* integers) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return quantize_group_of<DType::kBFloat16>(p, token, group, integers);
    case DType::kFloat16:
      return quantize_group_of<DType::kFloat16>(p, token, group, integers);
    default:
      return quantize_group_of<DType::kFloat32>(p, token, group, integers);
  }
}

// Few tokens: [token][K padded to tiles and one more] integers, then [scale group][8 tokens]
// scales. The stride is no power of two, or all tokens would share one cache set.
inline int64_t int8_few_stride(const Linear& p) {
  return (p.num_int8_tile_columns() + 1) * kInt8TileColumns;
}

inline const float* int8_few_scales(const Linear& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  return reinterpret_cast<const float*>(integers + p.num_tokens * int8_few_stride(p));
}

inline int64_t int8_few_bytes(const Linear& p) {
  return p.num_tokens * int8_few_stride(p) + p.num_int8_tile_columns() * kMostFewTokens * 4;
}

inline void prepare_int8_few(const Linear& p, void* workspace) {
  uint8_t* integers = static_cast<uint8_t*>(workspace);
  float* scales = const_cast<float*>(int8_few_scales(p, workspace));
  for (int64_t group = 0; group < p.num_int8_tile_columns(); ++group, scales += kMostFewTokens) {
    std::fill_n(scales, kMostFewTokens, 0.0f);  // those of no token are multiplied too
    for (int64_t token = 0; token < p.num_tokens; ++token)
      scales[token] = quantize(p, token, group,
                               integers + token * int8_few_stride(p) + group * kInt8TileColumns);
  }
}

}  // namespace
}  // namespace cast
