// Products of 8-bit and 4-bit weights with int8 x by AMX, whose integer sums are scaled after every
// scale group: of x, or of 4-bit weights the smaller of both.
#pragma once
#include "amx_items.h"

namespace cast {
namespace {

// More tokens are multiplied in pairs of blocks of 16.
constexpr int64_t kMostTokensBySixteen = 96;

// The integer sums of a scale group, still in the tile registers 0 to 3, and where they go.
struct Group {
  float* sums;          // [16 rows][2 token blocks][16][lanes]
  const float* scales;  // [16]; those of the second token block lie block_scales further
  int64_t block_scales;
  const float* row_scales;  // [32], of 4-bit weights
};

// A tile's i-th register has the rows from i * 16 / kLanes on, kLanes tokens of each.
template <int kLanes>
inline __m512 of_rows(const float* row_scales, int i) {
  if constexpr (kLanes == 16) return _mm512_set1_ps(row_scales[i]);
  alignas(64) int32_t rows[16];
  for (int j = 0; j < 16; ++j) rows[j] = (i * 16 + j) / kLanes;
  return _mm512_permutexvar_ps(_mm512_load_si512(rows), _mm512_load_ps(row_scales));
}

// sums += dots * the tokens' and the rows' scales, for half of a tile, whose i-th register has the
// 16 rows of one token if the weights keep n of 64.
template <typename Expander, int kLanes, int kRow, int kToken, int kHalf>
inline void add_scaled(const Group& group, const int32_t* dots) {
  constexpr int kBegin = kHalf * kLanes / 2, kEnd = (kHalf + 1) * kLanes / 2;
  float* sums = group.sums + (2 * kRow + kToken) * 16 * kLanes;
  const float* token_scales = group.scales + kToken * group.block_scales;
  const float* row_scales = group.row_scales + kRow * 16;
  const __m512 of_tokens = _mm512_loadu_ps(token_scales);
#pragma GCC unroll 8
  for (int i = kBegin; i < kEnd; ++i) {
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots + i * 16));
    __m512 scale = Expander::kIs64 ? _mm512_set1_ps(token_scales[i]) : of_tokens;
    if constexpr (Expander::kHasRowScales)
      scale = _mm512_mul_ps(
          scale, Expander::kIs64 ? _mm512_load_ps(row_scales) : of_rows<kLanes>(row_scales, i));
    _mm512_store_ps(sums + i * 16, _mm512_fmadd_ps(dot, scale, _mm512_load_ps(sums + i * 16)));
  }
}

// One scale group: one or two steps of up to 32 rows, times up to 32 tokens. Their integer
// sums stay in the tile registers; those of the group before are stored, each when its register is
// needed, and scaled while AMX multiplies. Stored at once they would keep AMX waiting: its sums are
// ready long after their instruction, and until they are read the register cannot be used again.
template <typename Tiles, typename Expander, int kRowTiles, int kTokenBlocks, int kLanes>
void multiply_group(const uint8_t* dense, const uint8_t* x, int64_t x_block_bytes, int32_t* dots,
                    const Group& before, Expander& expander, int64_t share) {
  constexpr int kSteps = Expander::kDenseSteps / Expander::kScaleGroups;
  const auto add = [&]<int kStep, int kRow, int kToken>() {
    if constexpr (kRow < kRowTiles && kToken < kTokenBlocks && kStep < kSteps) {
      constexpr int kSums = 2 * kRow + kToken;
      if constexpr (kToken == 0)
        Tiles::template load<4 + kRow>(dense + kStep * kStepTileBytes + kRow * kChunkBytes, 64);
      if constexpr (kRow == 0)
        Tiles::template load<6 + kToken>(x + kStep * 16 * 4 * kLanes + kToken * x_block_bytes,
                                         kLanes * 4);
      if constexpr (kStep == 0) {
        Tiles::template store<kSums>(dots + kSums * 16 * kLanes, kLanes * 4);
        Tiles::template zero<kSums>();
      }
      Tiles::template add_dot_int8<kSums, 4 + kRow, 6 + kToken>();
    }
  };
  const auto scale = [&]<int kRow, int kToken, int kHalf>() {
    if constexpr (kRow < kRowTiles && kToken < kTokenBlocks)
      add_scaled<Expander, kLanes, kRow, kToken, kHalf>(before,
                                                        dots + (2 * kRow + kToken) * 16 * kLanes);
  };
  expander.expand(share);
  add.template operator()<0, 0, 0>();
  add.template operator()<0, 0, 1>();
  scale.template operator()<0, 0, 0>();
  add.template operator()<0, 1, 0>();
  scale.template operator()<0, 0, 1>();
  add.template operator()<0, 1, 1>();
  scale.template operator()<0, 1, 0>();
  if constexpr (kTokenBlocks == 2) expander.expand(share);
  add.template operator()<1, 0, 0>();
  scale.template operator()<0, 1, 1>();
  add.template operator()<1, 0, 1>();
  scale.template operator()<1, 0, 0>();
  add.template operator()<1, 1, 0>();
  scale.template operator()<1, 0, 1>();
  add.template operator()<1, 1, 1>();
  scale.template operator()<1, 1, 0>();
  scale.template operator()<1, 1, 1>();
}

// The last group's sums, which nothing follows.
template <typename Tiles, typename Expander, int kRowTiles, int kTokenBlocks, int kLanes>
void finish_group(int32_t* dots, const Group& group) {
  store_tiles<Tiles, kRowTiles, kTokenBlocks>(dots, kLanes);
  const auto scale = [&]<int kRow, int kToken>() {
    if constexpr (kRow < kRowTiles && kToken < kTokenBlocks) {
      const int32_t* from = dots + (2 * kRow + kToken) * 16 * kLanes;
      add_scaled<Expander, kLanes, kRow, kToken, 0>(group, from);
      add_scaled<Expander, kLanes, kRow, kToken, 1>(group, from);
    }
  };
  scale.template operator()<0, 0>();
  scale.template operator()<0, 1>();
  scale.template operator()<1, 0>();
  scale.template operator()<1, 1>();
}

// The two functions above for a number of row tiles, token blocks and lanes.
template <typename Tiles, typename Expander>
struct GroupProduct {
  void (*multiply)(const uint8_t*, const uint8_t*, int64_t, int32_t*, const Group&, Expander&,
                   int64_t);
  void (*finish)(int32_t*, const Group&);

  bool operator==(const GroupProduct&) const = default;

  template <int kRowTiles, int kTokenBlocks, int kLanes>
  static constexpr GroupProduct of() {
    return {multiply_group<Tiles, Expander, kRowTiles, kTokenBlocks, kLanes>,
            finish_group<Tiles, Expander, kRowTiles, kTokenBlocks, kLanes>};
  }
  static GroupProduct of(bool two_rows, bool two_blocks, int64_t lanes) {
    if (two_blocks) return two_rows ? of<2, 2, 16>() : of<1, 2, 16>();
    switch (lanes) {
      case 1:
        return two_rows ? of<2, 1, 1>() : of<1, 1, 1>();
      case 2:
        return two_rows ? of<2, 1, 2>() : of<1, 1, 2>();
      case 4:
        return two_rows ? of<2, 1, 4>() : of<1, 1, 4>();
      case 8:
        return two_rows ? of<2, 1, 8>() : of<1, 1, 8>();
      default:
        return two_rows ? of<2, 1, 16>() : of<1, 1, 16>();
    }
  }
};

// Adds an item's products to a block's sums, as multiply_bf16 does; the last group's stay in the
// tile registers until `finish`.
template <typename Tiles, typename Expander>
struct Int8Products {
  AmxScratch& scratch;
  GroupProduct<Tiles, Expander> product = {};  // that the last group was multiplied by
  Group group = none();

  Group none() const { return {scratch.unused, scratch.unused, 0, scratch.unused}; }

  void multiply(const PassTokens& tokens, const Item& item, const uint8_t* dense,
                const float* row_scales, float* sums, Expander& expander) {
    if (item.is_first_chunk()) std::fill_n(sums, tokens.num_pairs() * tokens.pair_sums(), 0.0f);
    const bool by_pairs = tokens.num > kMostTokensBySixteen;
    const int64_t units = by_pairs ? tokens.num_pairs() : tokens.num_blocks();
    const int64_t tiles = item.tile_end - item.tile;
    constexpr int64_t kGroups = Expander::kScaleGroups;
    constexpr int64_t kGroupBytes = Expander::kDenseSteps / kGroups * kStepTileBytes;
    const int64_t rounds = tiles * kGroups * units * (by_pairs ? 2 : 1);
    const int64_t share = (expander.num_left() + rounds - 1) / rounds;
    const bool two_rows = item.has_two_row_tiles();
    const auto next = GroupProduct<Tiles, Expander>::of(two_rows, by_pairs, tokens.lanes);
    if (product != next) finish();  // whose sums are in other registers
    product = next;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t block = by_pairs ? 2 * unit : unit;
      // A pair whose second block is missing takes its first one twice.
      const bool is_half = by_pairs && block + 1 == tokens.num_blocks();
      float* unit_sums = sums + block / 2 * tokens.pair_sums() + block % 2 * 16 * tokens.lanes;
      const uint8_t* x = tokens.chunk(block, item);
      const float* scales = tokens.scales + (block * tokens.row_tiles + item.tile) * 16;
      for (int64_t i = 0; i < tiles * kGroups; ++i) {
        const int64_t tile = i / kGroups, x_step = i * kAmxTileSteps / kGroups;
        product.multiply(dense + i * kGroupBytes, x + x_step * tokens.step_bytes,
                         is_half ? 0 : tokens.block_bytes, scratch.dots, group, expander, share);
        group = {unit_sums, scales + tile * 16, is_half ? 0 : tokens.row_tiles * 16,
                 row_scales + tile * kTileScales + i % kGroups * kBlockRows};
      }
    }
  }
  void finish() {
    if (product.finish) product.finish(scratch.dots, group);
    group = none();
  }
};

}  // namespace
}  // namespace cast
