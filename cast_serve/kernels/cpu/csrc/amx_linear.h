// The linears of amx.cpp, for any number of tokens: packed weights become dense tiles in the cache,
// and AMX multiplies them with x. Its dense product is so fast that reading weights from memory
// takes longer for all but hundreds of tokens, and packed weights are what is read.
//
// Rows are cut in blocks of 32, K in chunks. While one block's chunk is multiplied, the next one is
// expanded into the other of two buffers, some tiles at a time, so that the CPU's vector units and
// AMX work at once. Up to 32 tokens, a block's bf16 sums stay in the tile registers for all of K.
// More tokens share a chunk of x in L2: all blocks of a slab take it in turn, and their sums wait
// in L2.
//
// Weights that keep n of 64 take all of this, with weights and x in each other's place (TokenRows
// in amx_tiles.h).
//
// The sums of int8 weights leave the tile registers after every scale group, to be scaled
// (amx_int8.h).
#pragma once
#include <algorithm>
#include <cstring>

#include "amx_int8.h"
#include "amx_items.h"

namespace cast {
namespace {

// Calls f<kRowTiles, kTokenBlocks>(), each 1 or 2.
template <typename Function>
inline void with_counts(bool two_rows, bool two_tokens, const Function& f) {
  if (two_rows && two_tokens) return f.template operator()<2, 2>();
  if (two_rows) return f.template operator()<2, 1>();
  if (two_tokens) return f.template operator()<1, 2>();
  return f.template operator()<1, 1>();
}

template <typename Tiles>
inline void load_tiles(const float* sums) {  // of more than 32 tokens, so of 16 lanes
  Tiles::template load<0>(sums, 64);
  Tiles::template load<1>(sums + 256, 64);
  Tiles::template load<2>(sums + 512, 64);
  Tiles::template load<3>(sums + 768, 64);
}

template <typename Tiles>
inline void zero_tiles() {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  Tiles::template zero<2>();
  Tiles::template zero<3>();
}

// bf16, one step: 64 bytes of K of up to 32 rows, times up to 32 tokens.
template <typename Tiles, int kRowTiles, int kTokenBlocks>
inline void add_step(const uint8_t* dense, const uint8_t* x, int64_t x_block_bytes, int64_t lanes) {
  Tiles::template load<4>(dense, 64);
  Tiles::template load<6>(x, lanes * 4);
  Tiles::template add_dot_bf16<0, 4, 6>();
  if constexpr (kRowTiles == 2) {
    Tiles::template load<5>(dense + kChunkBytes, 64);
    Tiles::template add_dot_bf16<2, 5, 6>();
  }
  if constexpr (kTokenBlocks == 2) {
    Tiles::template load<7>(x + x_block_bytes, lanes * 4);
    Tiles::template add_dot_bf16<1, 4, 7>();
    if constexpr (kRowTiles == 2) Tiles::template add_dot_bf16<3, 5, 7>();
  }
}

// Adds an item's products to a block's sums, [pair of token blocks][tile register][16][lanes].
template <typename Tiles, typename Expander>
void multiply_bf16(const PassTokens& tokens, const Item& item, const uint8_t* dense, float* sums,
                   Expander& expander) {
  const int64_t pairs = tokens.num_pairs(), tiles = item.tile_end - item.tile;
  const int64_t share = (expander.num_left() + tiles * pairs - 1) / (tiles * pairs);
  const bool two_rows = item.has_two_row_tiles();
  for (int64_t pair = 0; pair < pairs; ++pair, sums += tokens.pair_sums())
    with_counts(two_rows, tokens.has_two_blocks(pair), [&]<int kRowTiles, int kBlocks>() {
      if (item.is_first_chunk()) zero_tiles<Tiles>();
      if (!item.is_first_chunk() && !tokens.sums_stay()) load_tiles<Tiles>(sums);
      const uint8_t* x = tokens.chunk(2 * pair, item);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        expander.expand(share);
#pragma GCC unroll 2
        for (int64_t step = tile * kAmxTileSteps; step < (tile + 1) * kAmxTileSteps; ++step)
          add_step<Tiles, kRowTiles, kBlocks>(dense + step * kStepTileBytes,
                                              x + step * tokens.step_bytes, tokens.block_bytes,
                                              tokens.lanes);
      }
      if (!tokens.sums_stay() || item.is_last_chunk())
        store_tiles<Tiles, kRowTiles, kBlocks>(sums, tokens.lanes);
    });
}

inline void store_16(DType dtype, __m512 floats, uint8_t* out) {
  if (dtype == DType::kFloat32) return _mm512_store_ps(out, floats);
  const __m256i halves =
      dtype == DType::kBFloat16
          ? (__m256i)_mm512_cvtneps_pbh(floats)
          : _mm512_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), halves);
}

// The sums of a block, tile rows [row, row_end), and up to 32 tokens -> out, with scale and bias.
inline void store_block(const Linear& p, int64_t row, int64_t row_end, int64_t first_token,
                        const float* sums, int64_t lanes) {
  const int64_t size = element_bytes(p.dtype), first_n = row * p.tile_rows();
  const int64_t num_rows = std::min(row_end * p.tile_rows(), p.out_features) - first_n;
  const auto lane_mask = static_cast<__mmask16>((1u << lanes) - 1);
  alignas(64) uint8_t lines[kRegisterTokens][kBlockRows * 4];  // whole cache lines of out
  for (int64_t block = 0; block < 2; ++block) {
    const int64_t token = first_token + block * kRegisterTokens;
    const int64_t tokens = std::min(p.num_tokens - token, kRegisterTokens);
    if (tokens <= 0) break;
    for (int64_t half = 0; half * 16 < num_rows; ++half) {
      const int64_t n = first_n + half * 16;
      const auto inside =
          static_cast<__mmask16>((1u << std::min<int64_t>(num_rows - half * 16, 16)) - 1);
      const __m512 scale =
          p.scale ? _mm512_maskz_loadu_ps(inside, p.scale + n) : _mm512_set1_ps(1.0f);
      const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(inside, p.bias + n) : _mm512_setzero_ps();
      const float* tile = sums + (half * 2 + block) * 16 * lanes;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)  // of 64: rows of tokens already, garbage from `lanes` on
        rows[i] = p.kept != 0 ? _mm512_loadu_si512(tile + i * 16)
                              : _mm512_maskz_loadu_epi32(lane_mask, tile + i * lanes);
      if (p.kept == 0) transpose_16x16(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        store_16(p.dtype, _mm512_fmadd_ps(_mm512_castsi512_ps(rows[i]), scale, bias),
                 lines[i] + half * 16 * size);
    }
    uint8_t* out = static_cast<uint8_t*>(p.out) + (token * p.out_features + first_n) * size;
    for (int64_t i = 0; i < tokens; ++i, out += p.out_features * size) {
      if (num_rows * size == 64)
        _mm512_storeu_si512(out, _mm512_load_si512(lines[i]));
      else
        std::memcpy(out, lines[i], num_rows * size);
    }
  }
}

// A slab's sums -> out, token pair by token pair: the lines of out that lie side by side are
// written soon after each other.
inline void store_slab(const Linear& p, const Item& item, int64_t first_token,
                       const PassTokens& tokens, const float* sums) {
  for (int64_t pair = 0; pair < tokens.num_pairs(); ++pair) {
    const float* block_sums = sums + pair * tokens.pair_sums();
    for (int64_t row = item.slab; row < item.slab_end; row += item.block_rows) {
      store_block(p, row, std::min(row + item.block_rows, item.slab_end),
                  first_token + pair * kPairTokens, block_sums, tokens.lanes);
      block_sums += tokens.num_pairs() * tokens.pair_sums();
    }
  }
}

// Tokens [first, first_after) of the tile rows [begin, end).
template <typename Tiles, Weights kWeights, typename Expander>
void run_amx_pass(const Linear& p, const void* workspace, int64_t first, int64_t first_after,
                  int64_t begin, int64_t end, AmxScratch& scratch) {
  constexpr bool is_int8 = kWeights != Weights::kOfXsDType;
  const int64_t row_tiles = amx_tile_columns(p, kWeights), first_block = first / kRegisterTokens;
  PassTokens tokens = {};
  tokens.num = first_after - first;
  tokens.lanes = amx_lanes(p), tokens.row_tiles = row_tiles;
  tokens.step_bytes = amx_x_step_bytes(p), tokens.block_bytes = amx_x_block_bytes(p, kWeights);
  tokens.x = static_cast<const uint8_t*>(workspace) + first_block * tokens.block_bytes;
  if constexpr (is_int8) tokens.scales = amx_scales(p, workspace) + first_block * row_tiles * 16;
  const int64_t pairs = tokens.num_pairs(), block_sums = pairs * tokens.pair_sums();
  const int64_t slab_blocks =
      tokens.sums_stay() ? 1 : std::min(kAmxSumBytes / 4 / block_sums, kMostSlabBlocks);

  Item item = Item::first(p, begin, end, row_tiles, slab_blocks);
  Item next = item, later = item;
  next.advance();
  Int8Products<Tiles, Expander> int8{scratch};
  Expander expander(p, scratch.dense[0], scratch.row_scales[0], item, next);
  expander.expand(expander.num_left());
  for (int64_t number = 0; !item.is_end(); ++number) {
    later = next;
    if (!next.is_end()) later.advance();
    expander = Expander(p, scratch.dense[(number + 1) % 2], scratch.row_scales[(number + 1) % 3],
                        next, later);
    const uint8_t* dense = scratch.dense[number % 2];
    float* sums = scratch.sums + item.block() * block_sums;
    if constexpr (is_int8)
      int8.multiply(tokens, item, dense, scratch.row_scales[number % 3], sums, expander);
    else
      multiply_bf16<Tiles>(tokens, item, dense, sums, expander);
    expander.expand(expander.num_left());
    if (item.is_last_of_slab()) {
      int8.finish();
      store_slab(p, item, first, tokens, scratch.sums);
    }
    item = next, next = later;
  }
}

// Rows of the odd half of a block are multiplied too, whatever they hold, and their sums left.
inline AmxScratch& amx_scratch() {
  static thread_local AmxScratch scratch;
  return scratch;
}

template <typename Tiles, Weights kWeights, typename Expander>
void run_amx_by(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (begin == end) return;
  const int64_t lanes = amx_lanes(p);
  Expander::kIs64 ? Tiles::configure(lanes, 64) : Tiles::configure(kTileRegisterRows, lanes * 4);
  const int64_t passes = (p.num_tokens + kAmxPassTokens - 1) / kAmxPassTokens;
  const int64_t pairs = (p.num_tokens + kPairTokens - 1) / kPairTokens;
  const int64_t pass_tokens = (pairs + passes - 1) / passes * kPairTokens;
  for (int64_t first = 0; first < p.num_tokens; first += pass_tokens)
    run_amx_pass<Tiles, kWeights, Expander>(p, workspace, first,
                                            std::min(first + pass_tokens, p.num_tokens), begin, end,
                                            amx_scratch());
  Tiles::release();
}

template <typename Tiles, Weights kWeights, int kGroups = 1>
void run_amx(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.kept == 0)
    return run_amx_by<Tiles, kWeights, Expander<kWeights, kGroups, false>>(p, workspace, begin,
                                                                           end);
  if constexpr (kWeights != Weights::kDenseInt8)
    run_amx_by<TokenRows<Tiles>, kWeights, Expander<kWeights, kGroups, true>>(p, workspace, begin,
                                                                              end);
}

}  // namespace
}  // namespace cast
