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
// The sums of int8 weights leave the tile registers after every scale group, to be scaled.
#pragma once
#include <algorithm>
#include <cstring>

#include "amx_expand.h"
#include "amx_tiles.h"
#include "amx_x.h"

namespace cast {
namespace {

constexpr int64_t kBlockTileRows = 4, kBlockRows = kBlockTileRows * kTileRows;
constexpr int64_t kPairTokens = 2 * kRegisterTokens;
constexpr int64_t kAmxPassTokens = 256;      // whose sums stay in L2
constexpr int64_t kAmxSumBytes = 512 << 10;  // of a slab
constexpr int64_t kChunkTiles = 2;           // packed tiles side by side
constexpr int64_t kStepTileBytes = 16 * 64;  // a weight tile of one step
constexpr int64_t kDotsOfGroup = 16 * 16, kDotsOfRows = kChunkTiles * kDotsOfGroup;  // int32
constexpr int64_t kChunkBytes = kChunkTiles * kAmxTileSteps * kStepTileBytes;        // of 16 rows

// A block's chunk: packed tiles [row, row_end) x [tile, tile_end), in the slab [slab, slab_end).
// They come slab by slab, chunk by chunk, block by block.
struct Item {
  int64_t end, row_tiles, slab_rows;  // of the whole pass
  int64_t slab, slab_end, row, row_end, tile, tile_end;

  static Item first(int64_t begin, int64_t end, int64_t row_tiles, int64_t slab_rows) {
    Item item = {};
    item.end = end, item.row_tiles = row_tiles, item.slab_rows = slab_rows;
    item.slab = item.row = begin;
    item.find_ends();
    return item;
  }
  void find_ends() {
    slab_end = std::min(slab + slab_rows, end);
    row_end = std::min(row + kBlockTileRows, slab_end);
    tile_end = std::min(tile + kChunkTiles, row_tiles);
  }
  void advance() {
    row = row_end;
    if (row == slab_end) row = slab, tile = tile_end;
    if (tile == row_tiles) slab = row = slab_end, tile = 0;
    find_ends();
  }
  bool is_end() const { return slab == end; }
  bool is_first_chunk() const { return tile == 0; }
  bool is_last_chunk() const { return tile_end == row_tiles; }
};

// Expands an item's tiles, as many at a time as are asked for, and prefetches those of the next
// item.
template <AmxWeights kWeights>
struct Expander {
  const uint8_t* packed;
  uint8_t* dense;  // [16 rows][step][16][64 bytes], kChunkBytes for 16 rows
  Item item;
  int64_t row, tile, num_left;  // the first tile that is not expanded yet, and how many
  int64_t ahead;                // bytes from a tile to its counterpart of the next item

  Expander(const uint8_t* packed_tiles, uint8_t* to, const Item& now, const Item& next)
      : packed(packed_tiles), dense(to), item(now), row(now.row), tile(now.tile) {
    num_left = now.is_end() ? 0 : (now.row_end - now.row) * (now.tile_end - now.tile);
    const int64_t tiles = (next.row - now.row) * now.row_tiles + next.tile - now.tile;
    ahead = next.is_end() ? 0 : tiles * amx_tile_bytes(kWeights);
  }

  void expand(int64_t num_tiles) {
    constexpr int64_t bytes = amx_tile_bytes(kWeights);
    for (num_tiles = std::min(num_tiles, num_left); num_tiles > 0; --num_tiles) {
      const int64_t in_block = row - item.row;
      const uint8_t* from = packed + (row * item.row_tiles + tile) * bytes;
      prefetch<bytes / 64, Prefetch::kT1>(from + ahead);
      expand_tile<kWeights>(from,
                            dense + in_block / 2 * kChunkBytes + in_block % 2 * kTileRows * 64 +
                                (tile - item.tile) * kAmxTileSteps * kStepTileBytes,
                            kStepTileBytes);
      if (++tile == item.tile_end) tile = item.tile, ++row;
      --num_left;
    }
  }
};

// The work space of one thread. Sums are [block][pair of token blocks][tile register][16][lanes].
struct AmxScratch {
  alignas(64) uint8_t dense[2][2 * kChunkBytes];
  alignas(64) float sums[kAmxSumBytes / 4];
  alignas(64) int32_t dots[2][2 * kDotsOfRows];
};

// Calls f<kRowTiles, kTokenBlocks>(), each 1 or 2.
template <typename Function>
inline void with_counts(bool two_rows, bool two_tokens, const Function& f) {
  if (two_rows && two_tokens) return f.template operator()<2, 2>();
  if (two_rows) return f.template operator()<2, 1>();
  if (two_tokens) return f.template operator()<1, 2>();
  return f.template operator()<1, 1>();
}

// Tile register 2 * i + j has the sums of row tile i and token block j.
template <typename Tiles, int kRowTiles, int kTokenBlocks>
inline void store_tiles(void* sums, int64_t lanes) {
  uint8_t* to = static_cast<uint8_t*>(sums);
  const int64_t bytes = 16 * lanes * 4;
  Tiles::template store<0>(to, lanes * 4);
  if constexpr (kTokenBlocks == 2) Tiles::template store<1>(to + bytes, lanes * 4);
  if constexpr (kRowTiles == 2) Tiles::template store<2>(to + 2 * bytes, lanes * 4);
  if constexpr (kRowTiles == 2 && kTokenBlocks == 2)
    Tiles::template store<3>(to + 3 * bytes, lanes * 4);
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

// int8, one scale group: two steps of up to 32 rows, times up to 16 tokens. The integer sums of the
// second 16 rows go to dots + kDotsOfRows.
template <typename Tiles, int kRowTiles>
inline void multiply_group(const uint8_t* dense, const uint8_t* x, int64_t lanes, int32_t* dots) {
  Tiles::template zero<0>();
  Tiles::template load<6>(x, lanes * 4);
  Tiles::template load<4>(dense, 64);
  Tiles::template add_dot_int8<0, 4, 6>();
  if constexpr (kRowTiles == 2) {
    Tiles::template zero<1>();
    Tiles::template load<5>(dense + kChunkBytes, 64);
    Tiles::template add_dot_int8<1, 5, 6>();
  }
  Tiles::template load<7>(x + 16 * 4 * lanes, lanes * 4);
  Tiles::template load<4>(dense + kStepTileBytes, 64);
  Tiles::template add_dot_int8<0, 4, 7>();
  Tiles::template store<0>(dots, lanes * 4);
  if constexpr (kRowTiles == 2) {
    Tiles::template load<5>(dense + kChunkBytes + kStepTileBytes, 64);
    Tiles::template add_dot_int8<1, 5, 7>();
    Tiles::template store<1>(dots + kDotsOfRows, lanes * 4);
  }
}

// The integer sums of up to 32 rows and 16 tokens and some scale groups, not scaled yet. That is
// done while AMX multiplies the next tokens: read at once, they would keep the CPU waiting for it.
struct Pending {
  const int32_t* dots;  // [16 rows][group][16][lanes]
  const float* scales;  // [group][16]
  float* sums;          // [16 rows][2][16][lanes]
  int64_t num_groups, num_row_tiles;
  bool is_first;
};

// sums (+)= dots * the tokens' scales, of 16 rows.
template <int kLanes>
inline void add_scaled(const Pending& pending, int64_t row_tile) {
  if (row_tile >= pending.num_row_tiles) return;
  const int32_t* dots = pending.dots + row_tile * kDotsOfRows;
  float* kept = pending.sums + row_tile * 2 * 16 * kLanes;
  __m512 sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    sums[i] = pending.is_first ? _mm512_setzero_ps() : _mm512_load_ps(kept + i * 16);
  for (int64_t group = 0; group < pending.num_groups; ++group, dots += kDotsOfGroup) {
    const __m512 scale = _mm512_loadu_ps(pending.scales + group * 16);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      sums[i] =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots + i * 16)), scale, sums[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) _mm512_store_ps(kept + i * 16, sums[i]);
}

inline auto scaled_adder(int64_t lanes) {
  switch (lanes) {
    case 1:
      return add_scaled<1>;
    case 2:
      return add_scaled<2>;
    case 4:
      return add_scaled<4>;
    case 8:
      return add_scaled<8>;
    default:
      return add_scaled<16>;
  }
}

inline void store_16(DType dtype, __m512 floats, uint8_t* out) {
  if (dtype == DType::kFloat32) return _mm512_store_ps(out, floats);
  const __m256i halves =
      dtype == DType::kBFloat16
          ? (__m256i)_mm512_cvtneps_pbh(floats)
          : _mm512_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), halves);
}

// A block's sums of up to 32 tokens -> out, with scale and bias.
inline void store_amx_block(const Linear24& p, const Item& item, int64_t first_token,
                            const float* sums, int64_t lanes) {
  const int64_t size = element_bytes(p.dtype), first_n = item.row * kTileRows;
  const int64_t num_rows = std::min(item.row_end * kTileRows, p.out_features) - first_n;
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
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_maskz_loadu_epi32(lane_mask, tile + i * lanes);
      transpose_16x16(rows);
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

// Tokens [first, first + kAmxPassTokens) of the tile rows [begin, end).
template <typename Tiles, AmxWeights kWeights>
void run_amx_pass(const Linear24& p, const void* workspace, int64_t first, int64_t begin,
                  int64_t end, AmxScratch& scratch) {
  constexpr bool is_int8 = kWeights != AmxWeights::kBf16With24;
  const int64_t row_tiles = amx_tile_columns(p, kWeights), lanes = amx_lanes(p);
  const int64_t tokens = std::min(p.num_tokens - first, kAmxPassTokens);
  const int64_t pairs = (tokens + kPairTokens - 1) / kPairTokens, pair_sums = 4 * 16 * lanes;
  const int64_t x_step_bytes = amx_x_step_bytes(p), x_block_bytes = amx_x_block_bytes(p, kWeights);
  const uint8_t* x =
      static_cast<const uint8_t*>(workspace) + first / kRegisterTokens * x_block_bytes;
  const float* scales = nullptr;
  if constexpr (is_int8)
    scales = amx_scales(p, workspace) + first / kRegisterTokens * row_tiles * 16;

  const bool stays = pairs == 1;  // bf16: the sums stay in the tile registers
  const int64_t slab_blocks = stays ? 1 : kAmxSumBytes / 4 / (pairs * pair_sums);
  Item item = Item::first(begin, end, row_tiles, slab_blocks * kBlockTileRows);
  Item next = item, later = item;
  next.advance();
  int64_t number = 0;
  int64_t dots_number = 0;
  Pending pending = {};
  const auto add_pending = scaled_adder(lanes);
  Expander<kWeights> expander(p.packed, scratch.dense[0], item, next);
  expander.expand(expander.num_left);
  for (; !item.is_end(); ++number) {
    later = next;
    if (!next.is_end()) later.advance();
    expander = Expander<kWeights>(p.packed, scratch.dense[(number + 1) % 2], next, later);
    const uint8_t* dense = scratch.dense[number % 2];
    float* block_sums = scratch.sums + (item.row - item.slab) / kBlockTileRows * pairs * pair_sums;
    const int64_t tiles = item.tile_end - item.tile;
    const bool two_rows = item.row_end - item.row > 2;
    // Tiles to expand in each of the rounds below.
    const int64_t blocks = (tokens + kRegisterTokens - 1) / kRegisterTokens;
    const int64_t rounds = tiles * (is_int8 ? blocks : pairs);
    const int64_t share = (expander.num_left + rounds - 1) / rounds;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const bool two_blocks = tokens - pair * kPairTokens > kRegisterTokens;
      float* sums = block_sums + pair * pair_sums;
      const uint8_t* x_pair =
          x + pair * 2 * x_block_bytes + item.tile * kAmxTileSteps * x_step_bytes;
      if constexpr (is_int8) {
        for (int block = 0; block < 1 + two_blocks; ++block) {
          int32_t* dots = scratch.dots[dots_number++ % 2];
          const uint8_t* x_block = x_pair + block * x_block_bytes;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            expander.expand(share);
            const auto multiply = two_rows ? multiply_group<Tiles, 2> : multiply_group<Tiles, 1>;
            multiply(dense + tile * kAmxTileSteps * kStepTileBytes,
                     x_block + tile * kAmxTileSteps * x_step_bytes, lanes,
                     dots + tile * kDotsOfGroup);
            if (tile == 0) add_pending(pending, 0);
            if (tile == tiles / 2) add_pending(pending, 1);
          }
          const float* block_scales = scales + ((pair * 2 + block) * row_tiles + item.tile) * 16;
          pending = {dots,  block_scales, sums + block * 16 * lanes,
                     tiles, 1 + two_rows, item.is_first_chunk()};
        }
        continue;
      }
      with_counts(two_rows, two_blocks, [&]<int kRowTiles, int kBlocks>() {
        if (item.is_first_chunk()) zero_tiles<Tiles>();
        if (!item.is_first_chunk() && !stays) load_tiles<Tiles>(sums);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          expander.expand(share);
#pragma GCC unroll 2
          for (int64_t step = tile * kAmxTileSteps; step < (tile + 1) * kAmxTileSteps; ++step)
            add_step<Tiles, kRowTiles, kBlocks>(dense + step * kStepTileBytes,
                                                x_pair + step * x_step_bytes, x_block_bytes, lanes);
        }
        if (!stays || item.is_last_chunk()) store_tiles<Tiles, kRowTiles, kBlocks>(sums, lanes);
      });
    }
    expander.expand(expander.num_left);
    if (item.is_last_chunk()) {
      add_pending(pending, 0), add_pending(pending, 1);
      pending = {};
      for (int64_t pair = 0; pair < pairs; ++pair)
        store_amx_block(p, item, first + pair * kPairTokens, block_sums + pair * pair_sums, lanes);
    }
    item = next, next = later;
  }
}

template <typename Tiles, AmxWeights kWeights>
void run_amx(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  if (begin == end) return;
  // Rows of the odd half of a block are multiplied too, and their sums left.
  static thread_local AmxScratch scratch;
  Tiles::configure(amx_lanes(p));
  for (int64_t first = 0; first < p.num_tokens; first += kAmxPassTokens)
    run_amx_pass<Tiles, kWeights>(p, workspace, first, begin, end, scratch);
  Tiles::release();
}

}  // namespace
}  // namespace cast
