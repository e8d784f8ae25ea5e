// What the AVX-512 kernels share: prefetching, masks, rounding, sums across lanes, transposes.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear24.h"

namespace cast {
namespace {

template <int kLines, Prefetch kPrefetch>
void prefetch(const uint8_t* bytes) {
  if constexpr (kPrefetch != Prefetch::kNone) {
    constexpr auto hint = kPrefetch == Prefetch::kT0 ? _MM_HINT_T0 : _MM_HINT_T1;
#pragma GCC unroll 16
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(bytes + line * 64), hint);
  }
}

inline __mmask8 first_of_eight(int64_t count) {
  return static_cast<__mmask8>((1 << std::clamp<int64_t>(count, 0, 8)) - 1);
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

// Sums of a token for the out_features from n on, sixteen or up to last_n -> x's dtype, with scale
// and bias.
inline void store_rows(const Linear& p, int64_t n, int64_t last_n, int64_t token, __m512 sums) {
  const int64_t left = std::min<int64_t>(last_n - n, 16), size = element_bytes(p.dtype);
  if (left <= 0) return;
  const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
  if (p.scale) sums = _mm512_mul_ps(sums, _mm512_maskz_loadu_ps(inside, p.scale + n));
  if (p.bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(inside, p.bias + n));
  uint8_t* out = static_cast<uint8_t*>(p.out) + (token * p.out_features + n) * size;
  alignas(64) uint8_t rounded[64];
  uint8_t* to = left == 16 ? out : rounded;
  store_8(p.dtype, _mm512_castps512_ps256(sums), to);
  store_8(p.dtype, _mm512_extractf32x8_ps(sums, 1), to + 8 * size);
  if (to == rounded) std::memcpy(out, rounded, left * size);
}

// Lane i of the result is the sum of the lanes of sums[i].
inline __m512 sums_of_lanes(__m512 sums[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 8], 0x44),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 4], 0x88),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    sums[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[i], sums[i + 2]),
                            _mm512_unpackhi_ps(sums[i], sums[i + 2]));
  const __m512 mixed =
      _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  return _mm512_shuffle_f32x4(mixed, mixed, 0xd8);  // swaps the middle quarters
}

// rows[i] becomes column i of the sixteen rows of 32-bit values.
inline void transpose_16x16(__m512i rows[16]) {
  __m512i twos[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // each quarter of a register gets one column of four rows
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    rows[to] = _mm512_unpacklo_epi64(twos[from], twos[from + 2]);
    rows[to + 1] = _mm512_unpackhi_epi64(twos[from], twos[from + 2]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i more_even = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i more_odd = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
  }
}

}  // namespace
}  // namespace cast
