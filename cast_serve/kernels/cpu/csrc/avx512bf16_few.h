// The kernel for few tokens of avx512bf16.cpp.
//
// A row's 64 position bits become 32 column numbers (multishift, one ternary logic), two registers
// of x are permuted by them, and one vdpbf16ps multiplies 32 kept weights, that is 64 dense ones.
#pragma once
#include <cstring>

#include "avx512_few.h"

namespace cast {
namespace {

// Elements from a token to the next. Not a power of two, or all tokens would share one cache set.
inline int64_t few_stride(const Linear& p) { return (p.num_tile_columns() + 1) * kTileColumns; }

inline void prepare_few(const Linear& p, uint16_t* rows) {
  const int64_t stride = few_stride(p);
  for (int64_t token = 0; token < p.num_tokens; ++token, rows += stride) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
    std::memcpy(rows, x, p.in_features * 2);
    std::memset(rows + p.in_features, 0, (stride - p.in_features) * 2);
  }
}

template <Prefetch kPrefetch>
struct FewBf16 {
  static constexpr int64_t kTileBytes = kTileRows * (kTileKept * 2 + 8);
  static constexpr int64_t kTileLines = kTileBytes / 64;
  static int64_t tile_bytes(const Linear&) { return kTileBytes; }
  static constexpr int64_t kTileColumns = cast::kTileColumns, kElementBytes = 2;

  template <int kToken, int kTokens, int kRows, int kLines>
  static __attribute__((noinline)) void gather(const Linear& p, const void* workspace,
                                               const Segment& segment, const Pass& pass) {
    alignas(64) uint8_t shifts[64];
    alignas(64) uint16_t bases[32];
    for (int j = 0; j < 32; ++j) {
      shifts[2 * j] = shifts[2 * j + 1] = 2 * j;
      bases[j] = j / 2 * 4;
    }
    const __m512i shift = _mm512_load_si512(shifts), base = _mm512_load_si512(bases);
    const __m512i three = _mm512_set1_epi16(3);
    const int64_t stride = few_stride(p), n = pass.n, row = n % kTileRows;
    const uint16_t* x = static_cast<const uint16_t*>(workspace) + kToken * stride;
    const uint8_t* ahead = pass.ahead;
    const uint8_t* tile =
        p.packed + (n / kTileRows * p.num_tile_columns() + segment.begin) * kTileBytes;
    const uint8_t* values = tile + row * kTileKept * 2;
    const uint8_t* positions = tile + kTileRows * kTileKept * 2 + row * 8;

    __m512 sums[16] = {};  // [token][row]; only indexed in unrolled loops, to stay in registers
    for (int64_t k = segment.begin * kTileColumns; k < segment.end * kTileColumns;
         k += kTileColumns) {
      prefetch<kLines, kPrefetch>(ahead);
      __m512i low[kTokens], high[kTokens];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        low[token] = _mm512_loadu_si512(x + token * stride + k);
        high[token] = _mm512_loadu_si512(x + token * stride + k + 32);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i weights = _mm512_load_si512(values + i * kTileKept * 2);
        int64_t bits;
        std::memcpy(&bits, positions + i * 8, 8);
        const __m512i shifted = _mm512_multishift_epi64_epi8(shift, _mm512_set1_epi64(bits));
        const __m512i column =
            _mm512_ternarylogic_epi32(shifted, three, base, 0xEA);  // (a & 3) | base
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const __m512i gathered = _mm512_permutex2var_epi16(low[token], column, high[token]);
          __m512& sum = sums[token * kRows + i];
          sum = _mm512_dpbf16_ps(sum, (__m512bh)gathered, (__m512bh)weights);
        }
      }
      values += kTileBytes, positions += kTileBytes, ahead += pass.ahead_step;
    }

    __m512 total = sums_of_lanes(sums);
    if (!segment.is_first) total = _mm512_add_ps(total, _mm512_loadu_ps(pass.totals));
    if (!segment.is_last) return _mm512_storeu_ps(pass.totals, total);
    const int64_t rows = std::min<int64_t>(kRows, p.out_features - n);
    if (p.bias != nullptr) {
      const __m256 bias = _mm256_maskz_loadu_ps(first_of_eight(rows), p.bias + n);
      total =
          _mm512_add_ps(total, kRows == 8 ? _mm512_broadcast_f32x8(bias)
                                          : _mm512_broadcast_f32x4(_mm256_castps256_ps128(bias)));
    }
    alignas(32) uint16_t rounded[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh(total));
    uint16_t* out = static_cast<uint16_t*>(p.out) + kToken * p.out_features;
    for (int token = 0; token < kTokens && rows > 0; ++token)
      std::memcpy(out + token * p.out_features + n, rounded + token * kRows, rows * 2);
  }
};

}  // namespace
}  // namespace cast
