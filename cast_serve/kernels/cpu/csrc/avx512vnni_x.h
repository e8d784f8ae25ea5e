// How avx512vnni.cpp reads x and writes its products, whatever their dtype.
#pragma once
#define CAST_ISA avx512vnni
#include "avx512_common.h"
#include "elements.h"

namespace cast {
namespace {

constexpr uint8_t kZero = 128;  // is added to an integer of x to make it unsigned

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Quantises a token's scale group `group` to integers + kZero, and returns the scale.
inline float quantize(const Linear24& p, int64_t token, int64_t group, uint8_t* integers) {
  const int64_t first = token * p.x_stride + group * kInt8TileColumns;
  const int64_t columns = std::min(p.in_features - group * kInt8TileColumns, kInt8TileColumns);
  switch (p.dtype) {
    case DType::kBFloat16:
      return avx512vnni::quantize_group(static_cast<const avx512vnni::BFloat16*>(p.x) + first,
                                        columns, kZero, integers);
    case DType::kFloat16:
      return avx512vnni::quantize_group(static_cast<const _Float16*>(p.x) + first, columns, kZero,
                                        integers);
    default:
      return avx512vnni::quantize_group(static_cast<const float*>(p.x) + first, columns, kZero,
                                        integers);
  }
}

// Eight floats -> eight elements, rounded to nearest even.
inline void store_8(DType dtype, __m256 floats, void* out) {
  if (dtype == DType::kFloat32) return _mm256_storeu_ps(static_cast<float*>(out), floats);
  __m128i halves;
  if (dtype == DType::kFloat16) {
    halves = _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {  // bf16, without AVX-512 BF16
    const __m256i bits = _mm256_castps_si256(floats), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i result = _mm256_mask_mov_epi32(
        rounded, _mm256_cmp_ps_mask(floats, floats, _CMP_UNORD_Q), _mm256_set1_epi32(0x7FC00000));
    halves = _mm256_cvtepi32_epi16(_mm256_srli_epi32(result, 16));
  }
  _mm_storeu_si128(static_cast<__m128i*>(out), halves);
}

// Few tokens: [token][K padded to tiles and one more] integers, then [token][scale group] scales.
// The stride is no power of two, or all tokens would share one cache set.
inline int64_t int8_few_stride(const Linear24& p) {
  return (p.num_int8_tile_columns() + 1) * kInt8TileColumns;
}

inline const float* int8_few_scales(const Linear24& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  return reinterpret_cast<const float*>(integers + p.num_tokens * int8_few_stride(p));
}

inline int64_t int8_few_bytes(const Linear24& p) {
  return p.num_tokens * (int8_few_stride(p) + p.num_int8_tile_columns() * 4);
}

inline void prepare_int8_few(const Linear24& p, void* workspace) {
  uint8_t* integers = static_cast<uint8_t*>(workspace);
  float* scales = const_cast<float*>(int8_few_scales(p, workspace));
  const int64_t groups = p.num_int8_tile_columns();
  for (int64_t token = 0; token < p.num_tokens; ++token)
    for (int64_t group = 0; group < groups; ++group)
      scales[token * groups + group] = quantize(
          p, token, group, integers + token * int8_few_stride(p) + group * kInt8TileColumns);
}

}  // namespace
}  // namespace cast
