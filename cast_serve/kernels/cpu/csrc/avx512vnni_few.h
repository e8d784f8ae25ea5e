// The kernel for few tokens of avx512vnni.cpp.
//
// A row's 128 position bits become 64 column numbers (multishift, one ternary logic), two registers
// of x are permuted by them, and one vpdpbusd multiplies 64 kept weights, that is 128 dense ones: a
// scale group. Its integer sums then become float, are multiplied with the token's scale and added.
//
// vpdpbusd takes x unsigned, so x + 128 is stored. To take 128 * (sum of the weights) off again, a
// row's sums begin at -128 times its weights, lane by lane, for all tokens alike.
//
// 4-bit weights become 8-bit ones first (avx512vnni_int4.h). Their scales differ from tile to tile,
// so they are multiplied with the tokens' before the sums are: a tile ahead, since a load soon
// after the store of its bytes waits.
//
// Dense weights need no permuting: two vpdpbusd multiply the 128 of a row and tile.
#pragma once
#include <cstring>

#include "avx512_few.h"
#include "avx512vnni_int4.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

// kGroups: scale groups of a tile of 4-bit weights.
template <Prefetch kPrefetch, Weights kWeights, int kGroups = 1>
struct FewInt8Rows {
  static constexpr bool kIsDense = kWeights == Weights::kDenseInt8;
  static constexpr bool kIsInt4 = kWeights == Weights::kInt4;
  static constexpr int64_t kRowBytes = kIsDense  ? kInt8TileColumns
                                       : kIsInt4 ? kInt4RowBytes
                                                 : kInt8TileKept;  // of a tile's values
  static constexpr int64_t kTileLines = kIsDense ? 16 : kIsInt4 ? 7 : 10;
  static constexpr int64_t kTileColumns = kInt8TileColumns, kElementBytes = 1;
  static int64_t tile_bytes(const Linear& p) {
    return kIsDense ? kDenseInt8TileBytes : kIsInt4 ? p.int4_tile_bytes() : kInt8TileBytes;
  }

  // Tokens kToken to kToken + kTokens of kRows rows.
  template <int kToken, int kTokens, int kRows, int kLines>
  static __attribute__((noinline)) void gather(const Linear& p, const void* workspace,
                                               const Segment& segment, const Pass& pass) {
    alignas(64) uint8_t shifts[64], bases[64];
    for (int j = 0; j < 64; ++j) {
      const int kept = kIsInt4 ? int4_kept(j) : j;
      shifts[j] = 2 * kept % 64, bases[j] = kept / 2 * 4;
    }
    const __m512i shift = _mm512_load_si512(shifts), base = _mm512_load_si512(bases);
    const __m512i three = _mm512_set1_epi8(3), zero_point = _mm512_set1_epi8(kZero);
    const int64_t stride = int8_few_stride(p), n = pass.n, row = n % kTileRows;
    const int64_t row_tiles = p.num_int8_tile_columns();
    const uint8_t* x = static_cast<const uint8_t*>(workspace) + kToken * stride;
    const float* scales = int8_few_scales(p, workspace) + kToken;
    const uint8_t* ahead = pass.ahead;
    const int64_t tile_step = tile_bytes(p);
    const uint8_t* values = p.packed + (n / kTileRows * row_tiles + segment.begin) * tile_step;
    const uint8_t* positions = values + kTileRows * kRowBytes + row * (kInt8TileColumns / 8);
    const uint8_t* scale_words = values + kInt4ScalesAt + row * kGroups * 2;
    values += row * kRowBytes;

    // Of 4-bit weights, the products of both scales, [token][row] or, where a row has several,
    // [token][row][quarter of a tile].
    constexpr int kRowProducts = kGroups == 1 ? 1 : 4;
    alignas(64) float both_products[2][16 * kRowProducts];  // of an even and an odd tile
    const auto multiply_scales = [&](int64_t tile) {
      float* products = both_products[tile % 2];
      const float* of_tokens = scales + tile * kMostFewTokens;
      if constexpr (kGroups == 1) {
        const __m512i token_of_product = int4_token_numbers<kRows>();
        const __m512 tokens = _mm512_castps128_ps512(_mm_loadu_ps(of_tokens));
        _mm512_store_ps(products, _mm512_mul_ps(int4_row_scales<kRows>(scale_words),
                                                _mm512_permutexvar_ps(token_of_product, tokens)));
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < kRows; i += 4) {
          const __m512 rows = int4_quarter_scales<kGroups>(scale_words + i * kGroups * 2);
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token)
            _mm512_store_ps(products + (token * kRows + i) * 4,
                            _mm512_mul_ps(rows, _mm512_set1_ps(of_tokens[token])));
        }
      }
      scale_words += tile_step;
      // They are broadcast from memory: GCC would keep them and use two shuffles for each.
      asm("" : "+m"(both_products));
    };
    if constexpr (kIsInt4) multiply_scales(segment.begin);

    __m512 sums[16] = {};  // [token][row]; only indexed in unrolled loops, to stay in registers
    for (int64_t tile = segment.begin; tile < segment.end; ++tile) {
      prefetch<kLines, kPrefetch>(ahead);
      __m512i low[kTokens], high[kTokens];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        low[token] = _mm512_load_si512(x + token * stride + tile * kTileColumns);
        asm("" : "+v"(low[token]));  // keep it in a register: GCC would load it again for each row
        high[token] = _mm512_load_si512(x + token * stride + tile * kTileColumns + 64);
      }
      const float* products = both_products[tile % 2];
      if (kIsInt4 && tile + 1 < segment.end) multiply_scales(tile + 1);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i weights = kIsInt4 ? int4_weights(values + i * kRowBytes)
                                        : _mm512_load_si512(values + i * kRowBytes);
        if constexpr (kIsDense) {
          const __m512i more = _mm512_load_si512(values + i * kRowBytes + 64);
          __m512i start = _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero_point, weights);
          start = _mm512_dpbusd_epi32(start, zero_point, more);
          start = _mm512_sub_epi32(_mm512_setzero_si512(), start);
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token) {
            const __m512i half = _mm512_dpbusd_epi32(start, low[token], weights);
            const __m512 dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(half, high[token], more));
            __m512& sum = sums[token * kRows + i];
            sum = _mm512_fmadd_ps(dot, _mm512_set1_ps(scales[tile * kMostFewTokens + token]), sum);
          }
          continue;
        }
        const __m128i both = _mm_load_si128(
            reinterpret_cast<const __m128i*>(positions + i * (kInt8TileColumns / 8)));
        const __m512i bits =
            kIsInt4 ? _mm512_broadcast_i32x4(both)
                    : _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0),
                                               _mm512_castsi128_si512(both));
        const __m512i shifted = _mm512_multishift_epi64_epi8(shift, bits);
        const __m512i column =
            _mm512_ternarylogic_epi32(shifted, three, base, 0xEA);  // (a & 3) | base
        const __m512i start =
            _mm512_sub_epi32(_mm512_setzero_si512(),
                             _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero_point, weights));
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const __m512i gathered = _mm512_permutex2var_epi8(low[token], column, high[token]);
          const __m512 dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, gathered, weights));
          __m512& sum = sums[token * kRows + i];
          __m512 scale;
          if constexpr (!kIsInt4)
            scale = _mm512_set1_ps(scales[tile * kMostFewTokens + token]);
          else if constexpr (kGroups == 1)
            scale = _mm512_set1_ps(products[token * kRows + i]);
          else
            scale = _mm512_broadcast_f32x4(_mm_load_ps(products + (token * kRows + i) * 4));
          sum = _mm512_fmadd_ps(dot, scale, sum);
        }
      }
      values += tile_step, positions += tile_step, ahead += pass.ahead_step;
    }

    __m512 total = sums_of_lanes(sums);
    if (!segment.is_first) total = _mm512_add_ps(total, _mm512_loadu_ps(pass.totals));
    if (!segment.is_last) return _mm512_storeu_ps(pass.totals, total);
    const int64_t rows = std::min<int64_t>(kRows, p.out_features - n);
    const auto of_every_token = [&](const float* of_rows) {
      const __m256 eight = _mm256_maskz_loadu_ps(first_of_eight(rows), of_rows + n);
      return kRows == 8 ? _mm512_broadcast_f32x8(eight)
                        : _mm512_broadcast_f32x4(_mm256_castps256_ps128(eight));
    };
    if constexpr (!kIsInt4) total = _mm512_mul_ps(total, of_every_token(p.scale));
    if (p.bias != nullptr) total = _mm512_add_ps(total, of_every_token(p.bias));
    const int64_t size = element_bytes(p.dtype);
    alignas(64) uint8_t rounded[64];
    store_8(p.dtype, _mm512_castps512_ps256(total), rounded);
    store_8(p.dtype, _mm512_extractf32x8_ps(total, 1), rounded + 8 * size);
    uint8_t* out = static_cast<uint8_t*>(p.out) + (kToken * p.out_features + n) * size;
    const auto copy_rows = [&](int64_t bytes) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token)
        std::memcpy(out + token * p.out_features * size, rounded + token * kRows * size, bytes);
    };
    if (rows == kRows && size == 2)
      copy_rows(kRows * 2);  // a constant, so that nothing is called
    else if (rows > 0)
      copy_rows(rows * size);
  }
};

template <Prefetch kPrefetch>
using FewInt8 = FewInt8Rows<kPrefetch, Weights::kInt8>;
template <int kGroups>
struct FewInt4 {
  template <Prefetch kPrefetch>
  using Rows = FewInt8Rows<kPrefetch, Weights::kInt4, kGroups>;
};
template <Prefetch kPrefetch>
using FewDenseInt8 = FewInt8Rows<kPrefetch, Weights::kDenseInt8>;

}  // namespace
}  // namespace cast
