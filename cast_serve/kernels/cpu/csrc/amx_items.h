// What the products of amx_linear.h share: how rows and K are cut, and the tiles, tokens and memory
// that a thread works on.
#pragma once
#include <algorithm>

#include "amx_expand.h"
#include "amx_tiles.h"
#include "amx_x.h"

namespace cast {
namespace {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kPairTokens = 2 * kRegisterTokens;
constexpr int64_t kAmxPassTokens = 640;  // at most; more share an expansion, but not L2
constexpr int64_t kAmxSumBytes = 1 << 20, kMostSlabBlocks = 16;
constexpr int64_t kChunkTiles = 2;           // packed tiles side by side
constexpr int64_t kStepTileBytes = 16 * 64;  // a weight tile of one step
constexpr int64_t kChunkBytes = kChunkTiles * kMostDenseSteps * kStepTileBytes;  // of 16 rows
// The scales of a block's chunk of 4-bit weights: [tile][scale group][row].
constexpr int64_t kTileScales = kMostScaleGroups * kBlockRows;
constexpr int64_t kChunkScales = kChunkTiles * kTileScales;

// A block's chunk: packed tiles [row, row_end) x [tile, tile_end), in the slab [slab, slab_end).
// They come slab by slab, chunk by chunk, block by block.
struct Item {
  int64_t end, row_tiles, block_rows, slab_rows;  // of the whole pass, in packed tiles
  int64_t slab, slab_end, row, row_end, tile, tile_end;

  static Item first(const Linear& p, int64_t begin, int64_t end, int64_t row_tiles,
                    int64_t slab_blocks) {
    Item item = {};
    item.end = end, item.row_tiles = row_tiles;
    item.block_rows = kBlockRows / p.tile_rows();
    item.slab_rows = slab_blocks * item.block_rows;
    item.slab = item.row = begin;
    item.find_ends();
    return item;
  }
  void find_ends() {
    slab_end = std::min(slab + slab_rows, end);
    row_end = std::min(row + block_rows, slab_end);
    tile_end = std::min(tile + kChunkTiles, row_tiles);
  }
  void advance() {
    row = row_end;
    if (row == slab_end) row = slab, tile = tile_end;
    if (tile == row_tiles) slab = row = slab_end, tile = 0;
    find_ends();
  }
  bool is_end() const { return slab == end; }
  int64_t block() const { return (row - slab) / block_rows; }  // of the slab
  bool has_two_row_tiles() const { return 2 * (row_end - row) > block_rows; }
  bool is_first_chunk() const { return tile == 0; }
  bool is_last_chunk() const { return tile_end == row_tiles; }
  bool is_last_of_slab() const { return is_last_chunk() && row_end == slab_end; }
};

// Expands an item's tiles, as many at a time as are asked for, and prefetches those of the next
// item.
// kGroups: scale groups of a tile, each of which has sums of its own; 1, or 2 or 4 of 4-bit
// weights. kIs64: the weights keep n of 64.
template <Weights kWeights, int kGroups, bool kOf64>
struct Expander {
  static constexpr int kTileLines = kWeights == Weights::kDenseInt8 ? 16
                                    : kWeights == Weights::kInt8    ? 10
                                    : kWeights == Weights::kInt4    ? 7
                                                                    : 9;
  static constexpr bool kHasRowScales = kWeights == Weights::kInt4;
  static constexpr bool kIs64 = kOf64;
  static constexpr int kTileRowTiles = kIs64 ? 1 : 2;  // packed tiles with 16 rows
  static constexpr int kScaleGroups = kGroups;
  static constexpr int kDenseSteps =
      std::max(static_cast<int>(kAmxTileSteps), kGroups);  // of a tile
  const Linear* p;
  const uint8_t* from;  // the item's first tile
  uint8_t* to;          // [16 rows][step][16][64 bytes], kChunkBytes for 16 rows
  float* scales;        // [tile][scale group][32 rows], of 4-bit weights
  int64_t tile_bytes;
  int64_t row_bytes;  // of a packed tile row
  bool is_one_wide;   // else two tiles
  int64_t next = 0, end;
  int64_t ahead;  // bytes from a tile to its counterpart of the next item

  Expander(const Linear& linear, uint8_t* dense, float* row_scales, const Item& now,
           const Item& later)
      : p(&linear),
        to(dense),
        scales(row_scales),
        tile_bytes(amx_tile_bytes(linear, kWeights)),
        row_bytes(now.row_tiles * tile_bytes),
        is_one_wide(now.tile_end - now.tile == 1) {
    static_assert(kChunkTiles == 2);
    from = linear.packed + (now.row * now.row_tiles + now.tile) * tile_bytes;
    end = now.is_end() ? 0 : (now.row_end - now.row) * (now.tile_end - now.tile);
    const int64_t tiles = (later.row - now.row) * now.row_tiles + later.tile - now.tile;
    ahead = later.is_end() ? 0 : tiles * tile_bytes;
  }
  int64_t num_left() const { return end - next; }

  void expand(int64_t num_tiles) {
    const Expander e = *this;  // which the stores below cannot alias
    const int64_t last = std::min(e.end, e.next + num_tiles);
    for (int64_t i = e.next; i < last; ++i) {
      const int64_t row = e.is_one_wide ? i : i / 2, tile = e.is_one_wide ? 0 : i % 2;
      const uint8_t* packed = e.from + row * e.row_bytes + tile * e.tile_bytes;
      uint8_t* dense = e.to + row / kTileRowTiles * kChunkBytes +
                       row % kTileRowTiles * kTileRows * 64 + tile * kDenseSteps * kStepTileBytes;
      float* of_rows = e.scales + tile * kTileScales + row * (16 / kTileRowTiles);
      if constexpr (kIs64) {
        // More tokens' x and sums pass through L1.
        const bool into_l1 = e.p->num_tokens <= kPairTokens;
        expand_tile64<kWeights, kGroups>(*e.p, packed, packed + e.ahead, into_l1, dense,
                                         kStepTileBytes);
        for (int group = 0; kHasRowScales && group < kGroups; ++group)
          _mm512_store_ps(of_rows + group * kBlockRows,
                          row_scales64(packed + scales_at64(*e.p), group));
      } else {
        prefetch<kTileLines, Prefetch::kT1>(packed + e.ahead);
        expand_tile<kWeights, kGroups>(packed, dense, kStepTileBytes);
        if constexpr (kHasRowScales) read_int4_scales<kGroups>(packed, of_rows, kBlockRows);
      }
    }
    next = last;
  }
};

// Up to kAmxPassTokens tokens of x, as amx_x.h lays them out.
struct PassTokens {
  const uint8_t* x;
  const float* scales;  // of int8 x
  int64_t num, lanes, row_tiles, step_bytes, block_bytes;

  int64_t num_blocks() const { return (num + kRegisterTokens - 1) / kRegisterTokens; }
  int64_t num_pairs() const { return (num + kPairTokens - 1) / kPairTokens; }
  int64_t pair_sums() const { return 4 * 16 * lanes; }
  bool has_two_blocks(int64_t pair) const { return num - pair * kPairTokens > kRegisterTokens; }
  bool sums_stay() const { return num_pairs() == 1; }  // bf16: in the tile registers
  const uint8_t* chunk(int64_t block, const Item& item) const {
    return x + block * block_bytes + item.tile * kAmxTileSteps * step_bytes;
  }
};

// The work space of one thread. Sums are [block][pair of token blocks][tile register][16][lanes].
struct AmxScratch {
  alignas(64) uint8_t dense[2][2 * kChunkBytes];
  // Of this item, the one before, whose last sums are not scaled yet, and the next one.
  alignas(64) float row_scales[3][kChunkScales];
  alignas(64) float sums[kAmxSumBytes / 4];
  alignas(64) int32_t dots[4 * 16 * 16];
  alignas(64) float unused[4 * 16 * 16] = {};  // for the sums and scales of no group
};

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

}  // namespace
}  // namespace cast
