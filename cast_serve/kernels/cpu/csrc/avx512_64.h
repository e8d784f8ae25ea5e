// What the AVX-512 kernels for weights that keep n of 64 (linear64.h) share: where a panel's rows
// and tokens are cut, and the output.
//
// Two tile rows are read together, so that they share the loads of x (one of 8-bit weights for up
// to four tokens, which are bound by memory: a single stream is faster). Few tokens are multiplied
// with each step as it is expanded. More share a panel, some tiles of both rows: the first up to
// twelve are multiplied with each step as it is expanded and kept in L1, and the others with what
// was kept, up to twelve at a time; their sums, of up to 256 tokens, stay in L1 and L2.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "avx512_common.h"
#include "linear64.h"

namespace cast {
namespace {

constexpr int kRowsTogether = 2;            // tile rows
constexpr int64_t kPanelTokens = 256;       // that share an expanded tile
constexpr int kSteps64 = 32;                // of a tile
constexpr int64_t kStepBytes64 = 64;        // dense
constexpr int64_t kBytesAhead64 = 8 << 10;  // of the packed weights that are prefetched

// The weights of some of a panel's tiles as dense products take them, [tile][tile row][step].
constexpr int64_t kPanelTiles = 2;
using Panel = uint8_t[kPanelTiles][kRowsTogether][kSteps64][kStepBytes64];

inline uint64_t load_8_bytes(const uint8_t* from) {
  uint64_t bits;
  std::memcpy(&bits, from, 8);
  return bits;
}

inline __m512i broadcast_4_bytes(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// f(tile, token) for all of x, sixteen tokens at a time.
template <typename Function>
inline void for_each_tile_of_x(const Linear& p, const Function& f) {
  for (int64_t first = 0; first < p.num_tokens; first += 16)
    for (int64_t tile = 0; tile < num_tiles64(p); ++tile)
      for (int64_t token = first; token < std::min<int64_t>(first + 16, p.num_tokens); ++token)
        f(tile, token);
}

// A token's x, of 16 bits, of the tile after the next: sixteen rows are more than a CPU prefetches
// by itself.
template <int kLines>
inline void prefetch_x(const Linear& p, int64_t tile, int64_t token) {
  const auto* x = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
  prefetch<kLines, Prefetch::kT0>(reinterpret_cast<const uint8_t*>(x + (tile + 2) * kLines * 32));
}

// f<count>() for a count from 1 to kMost that is known when it runs.
template <int kMost, typename Function>
inline void with_constant(int64_t count, const Function& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    ((count == kIndex + 1 ? f.template operator()<kIndex + 1>() : void()), ...);
  }(std::make_integer_sequence<int, kMost>());
}

// f<tokens>(first) for blocks of up to kMost of `tokens`, as even as can be.
template <int kMost, typename Function>
inline void for_each_block(int64_t tokens, const Function& f) {
  const int64_t num_blocks = (tokens + kMost - 1) / kMost;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t first = tokens * block / num_blocks;
    with_constant<kMost>(tokens * (block + 1) / num_blocks - first,
                         [&]<int kTokens>() { f.template operator()<kTokens>(first); });
  }
}

// Few tokens. multiply<tokens, prefetch>(first token, the first of kRows tile rows) multiplies up
// to kMost; the rows' bytes are in L2 when the next tokens meet them.
template <int kMost, int kRows, typename Multiply>
inline void run_few64(const Linear& p, int64_t begin, int64_t end, const Multiply& multiply) {
  const auto run = [&]<Prefetch kPrefetch>() {
    for (int64_t row = begin; row < end; row += kRows)
      for_each_block<kMost>(p.num_tokens, [&]<int kTokens>(int64_t first) {
        multiply.template operator()<kTokens, kPrefetch>(first, row);
      });
  };
  if (p.tuning.prefetch == Prefetch::kT0) return run.template operator()<Prefetch::kT0>();
  run.template operator()<Prefetch::kT1>();  // without any it takes twice as long
}

// The tiles of kRows tile rows from `row` on, read together; after the last one it is taken twice.
template <int kRows, Prefetch kPrefetch>
struct RowsTogether {
  const int64_t num_tiles, tile_bytes, ahead_step;
  const int64_t skipped;  // bytes: behind a row's end lie the others, which are read already
  int64_t bytes_ahead, tiles_to_end;  // of the row that is prefetched
  const uint8_t* tiles[kRows];
  const uint8_t* ahead[kRows];

  RowsTogether(const Linear& p, int64_t row, int64_t end)
      : num_tiles(num_tiles64(p)),
        tile_bytes(tile_bytes64(p)),
        ahead_step((tile_bytes + kSteps64 - 1) / kSteps64),
        skipped(num_tiles * tile_bytes * (kRows - 1)) {
    const int64_t tiles_ahead = kBytesAhead64 / tile_bytes;
    bytes_ahead = tiles_ahead * tile_bytes + tiles_ahead / num_tiles * skipped;
    tiles_to_end = num_tiles - tiles_ahead % num_tiles;
    for (int j = 0; j < kRows; ++j)
      tiles[j] = p.packed + std::min(row + j, end - 1) * num_tiles * tile_bytes;
  }
  // Once for each of a tile's steps: a line that is left out costs more than one asked for twice.
  void prefetch(int j) {
    cast::prefetch<1, kPrefetch>(ahead[j]);
    ahead[j] += ahead_step;
  }
  void begin_tile() {
    if (tiles_to_end == 0) bytes_ahead += skipped, tiles_to_end = num_tiles;
    --tiles_to_end;
    for (int j = 0; j < kRows; ++j) ahead[j] = tiles[j] + bytes_ahead;
  }
  void end_tile() {
    for (int j = 0; j < kRows; ++j) tiles[j] += tile_bytes;
  }
};

// Some tokens' sums of a panel, [token][tile row][16 rows], in registers.
template <int kTokens>
using PanelSums = __m512[kRowsTogether][kTokens];

template <int kTokens>
inline void load_sums(const float* from, PanelSums<kTokens>& sums) {
#pragma GCC unroll 2
  for (int j = 0; j < kRowsTogether; ++j)
#pragma GCC unroll 12
    for (int token = 0; token < kTokens; ++token)
      sums[j][token] = _mm512_load_ps(from + (token * kRowsTogether + j) * kTileRows64);
}

template <int kTokens>
inline void keep_sums(const PanelSums<kTokens>& sums, float* to) {
#pragma GCC unroll 2
  for (int j = 0; j < kRowsTogether; ++j)
#pragma GCC unroll 12
    for (int token = 0; token < kTokens; ++token)
      _mm512_store_ps(to + (token * kRowsTogether + j) * kTileRows64, sums[j][token]);
}

// Many tokens. multiply<kTokens, kExpands>(panel, the number of its first tile, how many, the bytes
// of both tile rows' first, first token, sums) adds to sums, [token][tile row][16 rows], and
// expands the tiles into the panel as it does, if kExpands; else they are there.
template <int kMost, typename Multiply>
inline void run_panels(const Linear& p, int64_t begin, int64_t end, const Multiply& multiply) {
  const int64_t num_tiles = num_tiles64(p), tile_bytes = tile_bytes64(p);
  const int64_t row_bytes = num_tiles * tile_bytes;
  alignas(64) float sums[kPanelTokens * kRowsTogether * kTileRows64];
  alignas(64) Panel panel;
  for (int64_t row = begin; row < end; row += kRowsTogether)
    for (int64_t first = 0; first < p.num_tokens; first += kPanelTokens) {
      const int64_t tokens = std::min(p.num_tokens - first, kPanelTokens);
      std::memset(sums, 0, tokens * kRowsTogether * kTileRows64 * sizeof(float));
      for (int64_t tile = 0; tile < num_tiles; tile += kPanelTiles) {
        const int64_t tiles = std::min(num_tiles - tile, kPanelTiles);
        const uint8_t* rows[kRowsTogether];
        for (int j = 0; j < kRowsTogether; ++j)  // after the last row it is taken twice
          rows[j] = p.packed + std::min(row + j, end - 1) * row_bytes + tile * tile_bytes;
        // Behind a row's end lies the other, which is read already.
        const int64_t bytes = tiles * tile_bytes;
        const int64_t next = bytes + (tile + tiles == num_tiles ? row_bytes : 0);
        int64_t asked = 0;
        for_each_block<kMost>(tokens, [&]<int kTokens>(int64_t block) {
          // All at once they would wait for each other, and the products for them.
          for (; asked * tokens < (block + kTokens) * bytes; asked += 64)
            for (int j = 0; j < kRowsTogether; ++j)
              _mm_prefetch(reinterpret_cast<const char*>(rows[j] + next + asked), _MM_HINT_T1);
          float* of_block = sums + block * kRowsTogether * kTileRows64;
          if (block == 0)
            multiply.template operator()<kTokens, true>(panel, tile, tiles, rows, first, of_block);
          else
            multiply.template operator()<kTokens, false>(panel, tile, tiles, rows, first + block,
                                                         of_block);
        });
      }
      for (int64_t token = 0; token < tokens; ++token)
        for (int j = 0; j < kRowsTogether && row + j < end; ++j)
          store_rows(p, (row + j) * kTileRows64, p.out_features, first + token,
                     _mm512_load_ps(sums + (token * kRowsTogether + j) * kTileRows64));
    }
}

}  // namespace
}  // namespace cast
