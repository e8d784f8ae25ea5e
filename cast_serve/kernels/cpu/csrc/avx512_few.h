// Few tokens (decode), for weights of any type: memory-bound, so the weights are read once, in
// order.
//
// A Format says how: tile_bytes, kTileLines (as many cache lines or, as tiles of 4-bit weights do
// not begin at one, more), kTileColumns, kElementBytes (of an element of x in the workspace) and
// `gather`, which multiplies some rows of a segment of K by some tokens.
#pragma once
#include <algorithm>

#include "avx512_common.h"
#include "linear24.h"

namespace cast {
namespace {

constexpr int64_t kFewSlabRows = 64;  // tile rows that use a segment of x while it is in L1
// x of up to kWholeBytes is used whole; a larger one in segments of K that stay in L1 for a slab.
constexpr int64_t kWholeBytes = 40 << 10, kSegmentBytes = 16 << 10;
// Weights that are read once, in one pass, are prefetched that far; else as far as the next tile
// row. Less left memory idle on Zen 5; more must stay in L1, of 32 KB or 48, beside x.
constexpr int64_t kBytesAhead = 12 << 10;

// Some tiles of K. The sum of a product's segments is kept until the last one is added.
struct Segment {
  int64_t begin, end;  // tiles
  bool is_first, is_last;
};

// Tokens kToken to kToken + kTokens of kRows rows from out_feature n on. At every tile kLines cache
// lines are prefetched at `ahead`, which then advances by ahead_step bytes. totals:
// [kTokens][kRows].
struct Pass {
  int64_t n;
  float* totals;
  const uint8_t* ahead;
  int64_t ahead_step;
};

// kFirst + kSecond tokens. The registers are too few for all of them, so a tile row is read in
// several passes. Each prefetches its share of the next tile row, or memory would be idle in all
// passes but one.
template <typename Format, int kFirst, int kSecond, int kRows>
void run_few(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  constexpr int64_t kLines = Format::kTileLines;
  const int64_t tile_bytes = Format::tile_bytes(p);
  const int64_t row_tiles = (p.in_features + Format::kTileColumns - 1) / Format::kTileColumns;
  const int64_t x_bytes =
      (kFirst + kSecond) * row_tiles * Format::kTileColumns * Format::kElementBytes;
  const int64_t segments =
      x_bytes <= kWholeBytes ? 1 : (x_bytes + kSegmentBytes - 1) / kSegmentBytes;
  const int64_t tiles = (row_tiles + segments - 1) / segments;
  float totals[kFewSlabRows][4][16];  // of a tile row's passes

  for (int64_t slab = begin; slab < end; slab += kFewSlabRows) {
    const int64_t slab_end = std::min(slab + kFewSlabRows, end);
    for (int64_t tile = 0; tile < row_tiles; tile += tiles) {
      const Segment segment = {tile, std::min(tile + tiles, row_tiles), tile == 0,
                               tile + tiles >= row_tiles};
      for (int64_t row = slab; row < slab_end; ++row) {
        const int64_t n = row * kTileRows;
        auto& sums = totals[row - slab];
        int64_t next_row = row + 1, next_tile = tile;
        if (next_row == slab_end && !segment.is_last) next_row = slab, next_tile += tiles;
        if (next_row == slab_end && segment.is_last) next_tile = 0;
        const uint8_t* next = p.packed + (next_row * row_tiles + next_tile) * tile_bytes;
        if (kRows == kTileRows && segments == 1)
          next = p.packed + row * row_tiles * tile_bytes + kBytesAhead;
        if constexpr (kSecond == 0) {
          const int64_t share = tile_bytes * kRows / kTileRows;
          for (int64_t i = 0; i < kTileRows; i += kRows) {
            const Pass pass = {n + i, sums[i / kRows], next + i / kRows * tiles * share, share};
            Format::template gather<0, kFirst, kRows, (kLines * kRows + 7) / kTileRows>(
                p, workspace, segment, pass);
          }
        } else {  // a quarter of every tile's lines to each pass
          static_assert(kRows == 4);
          const auto pass = [&]<int kPass>() {
            constexpr int64_t from = kLines * kPass / 4, to = kLines * (kPass + 1) / 4;
            constexpr int kToken = kPass % 2 ? kFirst : 0, kTokens = kPass % 2 ? kSecond : kFirst;
            Format::template gather<kToken, kTokens, 4, to - from>(
                p, workspace, segment,
                {n + kPass / 2 * 4, sums[kPass], next + from * 64, tile_bytes});
          };
          pass.template operator()<0>();
          pass.template operator()<1>();
          pass.template operator()<2>();
          pass.template operator()<3>();
        }
      }
    }
  }
}

template <typename Format>
void run_few_tokens(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  switch (p.num_tokens) {
    case 1:
      return run_few<Format, 1, 0, 8>(p, workspace, begin, end);
    case 2:
      return run_few<Format, 2, 0, 8>(p, workspace, begin, end);
    case 3:
      return run_few<Format, 3, 0, 4>(p, workspace, begin, end);
    case 4:
      return run_few<Format, 4, 0, 4>(p, workspace, begin, end);
    case 5:
      return run_few<Format, 3, 2, 4>(p, workspace, begin, end);
    case 6:
      return run_few<Format, 3, 3, 4>(p, workspace, begin, end);
    case 7:
      return run_few<Format, 4, 3, 4>(p, workspace, begin, end);
    case 8:
      return run_few<Format, 4, 4, 4>(p, workspace, begin, end);
  }
}

template <template <Prefetch> typename Format>
void run_few_prefetching(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  switch (p.tuning.prefetch) {
    case Prefetch::kNone:
      return run_few_tokens<Format<Prefetch::kNone>>(p, workspace, begin, end);
    case Prefetch::kT0:
      return run_few_tokens<Format<Prefetch::kT0>>(p, workspace, begin, end);
    case Prefetch::kT1:
      return run_few_tokens<Format<Prefetch::kT1>>(p, workspace, begin, end);
  }
}

}  // namespace
}  // namespace cast
