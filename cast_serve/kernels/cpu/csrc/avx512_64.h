// What the AVX-512 kernels for weights that keep n of 64 (linear64.h) share: where a panel's rows
// and tokens are cut, and the output.
//
// Two tile rows are read together, so that they share the loads of x (one of 8-bit weights for up
// to four tokens, which are bound by memory: a single stream is faster). Few tokens are multiplied
// with each step as it is expanded. More meet a panel, some tiles of both rows, which is expanded
// into L1 and multiplied with up to twelve tokens at a time; their sums, of up to 256 tokens, stay
// in L1 and L2.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "avx512_common.h"
#include "linear64.h"

namespace cast {
namespace {

constexpr int kRowsTogether = 2;       // tile rows
constexpr int64_t kPanelTokens = 256;  // that share an expanded tile
constexpr int kSteps64 = 32;           // of a tile
constexpr int64_t kStepBytes64 = 64;   // dense
// Into L2: on Zen 4 a fifth faster at 1 and 4 tokens than into L1.
constexpr int64_t kBytesAhead64 = 20 << 10;  // of the packed weights that are prefetched

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

// f(tile, token) for all of x, sixteen tokens at a time: more rows at once are more than a CPU
// prefetches by itself.
template <typename Function>
inline void for_each_tile_of_x(const Linear& p, const Function& f) {
  for (int64_t first = 0; first < p.num_tokens; first += 16)
    for (int64_t tile = 0; tile < num_tiles64(p); ++tile)
      for (int64_t token = first; token < std::min<int64_t>(first + 16, p.num_tokens); ++token)
        f(tile, token);
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

// Few tokens. multiply<tokens>(first token, the first of kRows tile rows) multiplies up to kMost;
// the rows' bytes are in L2 when the next tokens meet them.
template <int kMost, int kRows, typename Multiply>
inline void run_few64(const Linear& p, int64_t begin, int64_t end, const Multiply& multiply) {
  for (int64_t row = begin; row < end; row += kRows)
    for_each_block<kMost>(p.num_tokens, [&]<int kTokens>(int64_t first) {
      multiply.template operator()<kTokens>(first, row);
    });
}

// The tiles of kRows tile rows from `row` on, read together; after the last one it is taken twice.
template <int kRows>
struct RowsTogether {
  const int64_t num_tiles, tile_bytes, ahead_step, tiles_ahead;
  const uint8_t* tiles[kRows];
  const uint8_t* ahead[kRows];

  RowsTogether(const Linear& p, int64_t row, int64_t end)
      : num_tiles(num_tiles64(p)),
        tile_bytes(tile_bytes64(p)),
        ahead_step((tile_bytes + kSteps64 - 1) / kSteps64),
        tiles_ahead(kBytesAhead64 / tile_bytes) {
    for (int j = 0; j < kRows; ++j)
      tiles[j] = p.packed + std::min(row + j, end - 1) * num_tiles * tile_bytes;
  }
  // Once for each of a tile's steps: a line that is left out costs more than one asked for twice.
  void prefetch(int j) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead[j]), _MM_HINT_T1);
    ahead[j] += ahead_step;
  }
  // Behind a row's end lie the others, which are read already: skip them.
  void begin_tile(int64_t tile) {
    const int64_t skipped = (tile + tiles_ahead) / num_tiles * num_tiles * (kRows - 1);
    for (int j = 0; j < kRows; ++j) ahead[j] = tiles[j] + (tiles_ahead + skipped) * tile_bytes;
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

// Many tokens. expand(tile bytes, to[step]) expands one tile; multiply<kTokens>(panel, the number
// of its first tile, how many, the bytes of both tile rows' first, first token, sums) adds to sums,
// [token][tile row][16 rows].
template <int kMost, typename Expand, typename Multiply>
inline void run_panels(const Linear& p, int64_t begin, int64_t end, const Expand& expand,
                       const Multiply& multiply) {
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
        for (int j = 0; j < kRowsTogether; ++j) {  // after the last row it is taken twice
          rows[j] = p.packed + std::min(row + j, end - 1) * row_bytes + tile * tile_bytes;
          for (int64_t i = 0; i < tiles; ++i) expand(rows[j] + i * tile_bytes, panel[i][j]);
        }
        // Behind a row's end lies the other, which is read already.
        const int64_t bytes = tiles * tile_bytes;
        const int64_t next = bytes + (tile + tiles == num_tiles ? row_bytes : 0);
        int64_t asked = 0;
        for_each_block<kMost>(tokens, [&]<int kTokens>(int64_t block) {
          // All at once they would wait for each other, and the products for them.
          for (; asked * tokens < (block + kTokens) * bytes; asked += 64)
            for (int j = 0; j < kRowsTogether; ++j)
              _mm_prefetch(reinterpret_cast<const char*>(rows[j] + next + asked), _MM_HINT_T1);
          multiply.template operator()<kTokens>(panel, tile, tiles, rows, first + block,
                                                sums + block * kRowsTogether * kTileRows64);
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
