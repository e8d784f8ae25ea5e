// Many tokens, for weights of 16, 8 and 4 bits: rows lie in lanes.
//
// The rows are the sixteen of two tiles, one below the other. A tile has sixteen steps, of as many
// columns as x has in eight bytes. For every step one register has 32 bits of kept weights of each
// row, and another where the row's activations lie in the eight bytes. These are broadcast, vpshufb
// gives each row its own, and one instruction multiplies and adds: two instructions and a broadcast
// load for a step, sixteen rows and a token. (On Zen 5 a load that broadcasts 16 bytes takes a
// shuffle's place too and costs half as much again.)
//
// Two tiles are taken apart once for up to 256 tokens. x of a segment of K stays in L1 while a slab
// of tile rows meets it, and the slab's sums stay in L2.
//
// A Format says how: tile_bytes and row_tiles, kTileLines (as many cache lines or, as tiles of
// 4-bit weights do not begin at one, more), kGroups (parts of a tile whose dots are added to the
// sums on their own), Tiles (two tiles taken apart in registers), Dots (of a token) and how they
// are added, kLatency (cycles until a sum of dots is ready), Offsets (of the same for all tokens)
// and what else a group's dots need to become sums.
#pragma once
#include <algorithm>
#include <cstring>

#include "avx512_common.h"
#include "linear24.h"

namespace cast {
namespace {

constexpr int kLaneRows = 2 * kTileRows;
constexpr int kSteps = 16;
constexpr int kStepBytes = 8;                               // of a token
constexpr int64_t kXBytes = kSteps * kStepBytes;            // of a token and a tile
constexpr int64_t kManySlabRows = 32;                       // tile rows; even
constexpr int64_t kManyPassTokens = 256;                    // that share tiles taken apart
constexpr int64_t kManySegmentBytes = 16 << 10;             // of x
constexpr int64_t kPairsAhead = 16, kPairsAheadOfMany = 2;  // pairs of tiles that are prefetched

using TilePair = const uint8_t* const (&)[2];

// Up to eight tokens are multiplied at once, two, four, six or eight; more four, eight or sixteen
// at a time.
inline int64_t many_padded_tokens(const Linear& p) {
  const int64_t multiple = p.num_tokens <= 8 ? 2 : 4;
  return (p.num_tokens + multiple - 1) / multiple * multiple;
}

// x of some tokens and tiles, [tile][padded token] of kXBytes, and of integers the scales, [tile]
// [padded token]; else null.
struct ManyX {
  const uint8_t* bytes;
  const float* scales;

  ManyX from(int64_t token) const {
    return {bytes + token * kXBytes, scales == nullptr ? nullptr : scales + token};
  }
};

template <typename Format>
struct KeptTiles {
  alignas(64) uint8_t columns[kSteps][64], weights[kSteps][64];
  typename Format::Offsets offsets[Format::kGroups];
  typename Format::Scales scales[Format::kGroups];
};

template <typename Format>
inline typename Format::Dots add_step(typename Format::Dots dots, const uint8_t* eight,
                                      __m512i columns, __m512i weights) {
  int64_t x;  // as a double, Zen 4 would broadcast it by a unit that the shuffle needs
  std::memcpy(&x, eight, kStepBytes);
  const __m512i of_rows = _mm512_shuffle_epi8(_mm512_set1_epi64(x), columns);
  return Format::add_dots(dots, of_rows, weights);
}

// f<0>() to f<kGroups - 1>()
template <int kGroups, typename Function>
inline void for_each_group(const Function& f) {
  f.template operator()<0>();
  if constexpr (kGroups > 1) f.template operator()<1>();
  if constexpr (kGroups > 2) f.template operator()<2>(), f.template operator()<3>();
}

template <typename Format>
inline void keep(TilePair pair, KeptTiles<Format>& kept) {
  constexpr int kGroupSteps = kSteps / Format::kGroups;
  const typename Format::Tiles tiles(pair);
  for_each_group<Format::kGroups>([&]<int kGroup>() {
    typename Format::Offsets offsets = {};
#pragma GCC unroll 16
    for (int step = kGroup * kGroupSteps; step < (kGroup + 1) * kGroupSteps; ++step) {
      const __m512i weights = tiles.weights(step);
      Format::add_offsets(offsets, weights);
      _mm512_store_si512(kept.weights[step], weights);
      _mm512_store_si512(kept.columns[step], tiles.columns(step));
    }
    kept.offsets[kGroup] = offsets;
    kept.scales[kGroup] = Format::template scales<kGroup>(pair);
  });
}

// Adds the rows times kTokens tokens to sums, [token][row].
template <typename Format, int kTokens>
inline void multiply_kept(const KeptTiles<Format>& kept, const ManyX& x, float* sums) {
  constexpr int kGroupSteps = kSteps / Format::kGroups;
  for (int group = 0; group < Format::kGroups; ++group) {
    typename Format::Dots dots[kTokens] = {};
    for (int step = group * kGroupSteps; step < (group + 1) * kGroupSteps; ++step) {
      const __m512i columns = _mm512_load_si512(kept.columns[step]);
      const __m512i weights = _mm512_load_si512(kept.weights[step]);
#pragma GCC unroll 16
      for (int token = 0; token < kTokens; ++token)
        dots[token] = add_step<Format>(dots[token], x.bytes + token * kXBytes + step * kStepBytes,
                                       columns, weights);
    }
    const auto offsets = kept.offsets[group];
#pragma GCC unroll 16
    for (int token = 0; token < kTokens; ++token)
      Format::add_to(sums + token * kLaneRows, dots[token], offsets, kept.scales[group], x.scales,
                     token);
  }
}

// The same, of tiles that are not kept, since no other tokens need them.
template <typename Format, int kTokens>
inline void multiply_at_once(TilePair pair, const ManyX& x, float* sums) {
  constexpr int kGroupSteps = kSteps / Format::kGroups;
  // A step of so few tokens takes less time than a sum takes to be ready: two sums take turns.
  constexpr int kTurns = kTokens * 2 < Format::kLatency * 3 ? 2 : 1;
  const typename Format::Tiles tiles(pair);
  for_each_group<Format::kGroups>([&]<int kGroup>() {
    typename Format::Dots dots[kTurns][kTokens] = {};
    typename Format::Offsets offsets = {};
#pragma GCC unroll 16
    for (int step = kGroup * kGroupSteps; step < (kGroup + 1) * kGroupSteps; ++step) {
      const __m512i columns = tiles.columns(step), weights = tiles.weights(step);
      Format::add_offsets(offsets, weights);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        auto& sum = dots[step % kTurns][token];
        sum =
            add_step<Format>(sum, x.bytes + token * kXBytes + step * kStepBytes, columns, weights);
      }
    }
    const auto of_rows = Format::template scales<kGroup>(pair);
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      if constexpr (kTurns == 2) dots[0][token] += dots[1][token];
      Format::add_to(sums + token * kLaneRows, dots[0][token], offsets, of_rows, x.scales, token);
    }
  });
}

// The pairs of tiles in the order in which they are multiplied: slab by slab, in it segment by
// segment, in that tile rows two by two.
struct TileWalk {
  int64_t end, row_tiles, segment_tiles;  // end: of the tile rows
  int64_t slab, row, segment = 0, tile = 0;

  int64_t slab_end() const { return std::min(slab + kManySlabRows, end); }
  int64_t segment_end() const { return std::min(segment + segment_tiles, row_tiles); }

  void advance() {
    if (++tile < segment_end()) return;
    row += 2;
    if (row >= slab_end()) {
      segment = segment_end();
      if (segment == row_tiles) segment = 0, slab += kManySlabRows;
      row = slab;
    }
    tile = segment;
  }
};

// A slab's sums, [16 rows][padded token][row], of some tokens.
inline void store_slab(const Linear& p, int64_t first_n, int64_t last_n, int64_t first_token,
                       int64_t padded, const float* sums) {
  const int64_t tokens = std::min(p.num_tokens - first_token, padded);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t n = first_n; n < last_n; n += kLaneRows)
      store_rows(p, n, last_n, first_token + token,
                 _mm512_load_ps(sums + (n - first_n) * padded + token * kLaneRows));
}

// kAtOnce: all tokens, multiplied at once; 0: more than eight. A function for each, since GCC keeps
// constants of the others in registers that then lack.
template <typename Format, int kAtOnce>
void run_so_many(const Linear& p, const ManyX& all_x, int64_t begin, int64_t end) {
  static const uint8_t no_tile[Format::kMostTileBytes] = {};  // below a last tile row
  const int64_t row_tiles = Format::row_tiles(p), padded = many_padded_tokens(p);
  const int64_t tile_bytes = Format::tile_bytes(p), row_bytes = row_tiles * tile_bytes;
  const int64_t x_bytes = std::min(padded, kManyPassTokens) * kXBytes;  // of a tile
  const int64_t segment_tiles = std::clamp<int64_t>(kManySegmentBytes / x_bytes, 1, row_tiles);
  const int64_t pairs_ahead = padded <= 16 ? kPairsAhead : kPairsAheadOfMany;
  alignas(64) float sums[kManySlabRows / 2 * kManyPassTokens * kLaneRows];
  KeptTiles<Format> kept;
  for (int64_t slab = begin; slab < end; slab += kManySlabRows) {
    const int64_t slab_end = std::min(slab + kManySlabRows, end);
    for (int64_t first = 0; first < padded; first += kManyPassTokens) {
      const int64_t tokens = std::min(padded - first, kManyPassTokens);
      std::memset(sums, 0, (slab_end - slab + 1) / 2 * tokens * kLaneRows * sizeof(float));
      TileWalk at = {end, row_tiles, segment_tiles, slab, slab}, ahead = at;
      for (int64_t i = 0; i < pairs_ahead; ++i) ahead.advance();
      for (; at.slab == slab; at.advance(), ahead.advance()) {
        const uint8_t* packed = p.packed + at.row * row_bytes + at.tile * tile_bytes;
        const uint8_t* const pair[2] = {packed, at.row + 1 < end ? packed + row_bytes : no_tile};
        const uint8_t* next = p.packed + ahead.row * row_bytes + ahead.tile * tile_bytes;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          if (p.tuning.prefetch == Prefetch::kT0)
            prefetch<Format::kTileLines, Prefetch::kT0>(next + i * row_bytes);
          else
            prefetch<Format::kTileLines, Prefetch::kT1>(next + i * row_bytes);
        }
        const ManyX x = all_x.from(at.tile * padded + first);
        float* to = sums + (at.row - slab) / 2 * tokens * kLaneRows;
        if constexpr (kAtOnce != 0) {
          multiply_at_once<Format, kAtOnce>(pair, x, to);
        } else {
          keep<Format>(pair, kept);
          int64_t token = 0;
          const auto multiply = [&]<int kTokens>() {
            multiply_kept<Format, kTokens>(kept, x.from(token), to + token * kLaneRows);
            token += kTokens;
          };
          while (token + 16 <= tokens) multiply.template operator()<16>();
          if (token + 8 <= tokens) multiply.template operator()<8>();
          if (token + 4 <= tokens) multiply.template operator()<4>();
        }
      }
      store_slab(p, slab * kTileRows, std::min(slab_end * kTileRows, p.out_features), first, tokens,
                 sums);
    }
  }
}

template <typename Format>
void run_many(const Linear& p, const ManyX& x, int64_t begin, int64_t end) {
  switch (many_padded_tokens(p)) {
    case 2:
      return run_so_many<Format, 2>(p, x, begin, end);
    case 4:
      return run_so_many<Format, 4>(p, x, begin, end);
    case 6:
      return run_so_many<Format, 6>(p, x, begin, end);
    case 8:
      return run_so_many<Format, 8>(p, x, begin, end);
    default:
      return run_so_many<Format, 0>(p, x, begin, end);
  }
}

}  // namespace
}  // namespace cast
