// The kernel for many tokens of avx512bf16.cpp.
//
// Compute-bound, so the dropped weights must cost nothing. For every group of four columns the six
// pairs (x_a, x_b) that two kept weights can be multiplied with are laid out once, 16 tokens in a
// register ("pair rows"). Then a group of a row is one vdpbf16ps per 16 tokens: its two weights,
// broadcast, times the pair row that its positions choose. K is cut in chunks whose pair rows stay
// in L1, N in slabs whose sums stay in L2.
#pragma once
#include <bit>
#include <cstring>

#include "avx512_common.h"

namespace cast {
namespace {

constexpr int64_t kTileBytes = kTileRows * (kTileKept * 2 + 8);
constexpr int64_t kGroups = kTileColumns / 4;
constexpr int64_t kFirstCode = 4;     // a group's four position bits: 4, 8, 9, 12, 13 or 14
constexpr int64_t kSlots = 11;        // of pair rows per group, indexed by them; six are used
constexpr int64_t kChunkTiles = 2;    // tiles of K whose pair rows stay in L1
constexpr int64_t kSlabRows = 64;     // tile rows whose sums stay in L2 meanwhile
constexpr int64_t kBlockTokens = 32;  // tokens that share one set of pair rows
constexpr int64_t kPassTokens = 4 * kBlockTokens;  // tokens whose sums stay in L2
// Tile rows prefetched ahead, into L1 or L2: never into none, since the CPU's own prefetch stops at
// every 4 KiB page.
constexpr int64_t kRowsAhead = 8;

// The tokens are cut in blocks of 32; the last one has 8, 16 or 32 lanes.
inline int64_t lanes_of(int64_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : kBlockTokens;
}

// out[i][token] = x[token][i]
inline void transpose_8x8(const __m128i x[8], __m128i out[8]) {
  __m128i twos[8], fours[8];
  for (int i = 0; i < 4; ++i) {
    twos[i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
    twos[i + 4] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 2) {
    fours[i] = _mm_unpacklo_epi32(twos[i], twos[i + 1]);
    fours[i + 1] = _mm_unpackhi_epi32(twos[i], twos[i + 1]);
  }
  for (int i = 0; i < 8; i += 2) {
    const int from = i / 4 * 4 + i / 2 % 2;
    out[i] = _mm_unpacklo_epi64(fours[from], fours[from + 2]);
    out[i + 1] = _mm_unpackhi_epi64(fours[from], fours[from + 2]);
  }
}

// x -> [block][K][lanes], so that a column of a block is one load.
inline void prepare_many(const Linear24& p, uint16_t* columns) {
  const int64_t padded_k = p.num_tile_columns() * kTileColumns;
  for (int64_t first = 0; first < p.num_tokens; first += kBlockTokens) {
    const int64_t lanes = lanes_of(p.num_tokens - first);
    for (int64_t lane = 0; lane < lanes; lane += 8)
      for (int64_t k = 0; k < padded_k; k += 8) {
        __m128i rows[8], out[8];
        for (int64_t i = 0; i < 8; ++i) {
          const int64_t token = first + lane + i;
          rows[i] = _mm_setzero_si128();
          if (token < p.num_tokens && k < p.in_features)
            rows[i] =
                _mm_maskz_loadu_epi16(first_of_eight(p.in_features - k),
                                      static_cast<const uint16_t*>(p.x) + token * p.x_stride + k);
        }
        transpose_8x8(rows, out);
        for (int64_t i = 0; i < 8; ++i)
          _mm_store_si128(reinterpret_cast<__m128i*>(columns + (k + i) * lanes + lane), out[i]);
      }
    columns += padded_k * lanes;
  }
}

// Eight or sixteen tokens in a register.
struct Tokens8 {
  using Sums = __m256;
  using Weights = __m256i;
  static constexpr int64_t kLanes = 8;
  static Weights four_groups(const uint8_t* weights) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)weights));
  }
  template <int kGroup>
  static Weights one_group(Weights four) {
    return _mm256_shuffle_epi32(four, kGroup * 0x55);
  }
  static Sums add_dot(Sums sums, Weights two, const uint8_t* pair) {
    return _mm256_dpbf16_ps(sums, (__m256bh)two, (__m256bh)_mm256_load_si256((const __m256i*)pair));
  }
  static void store_pair(const uint16_t* a, const uint16_t* b, uint32_t* pair) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
    _mm256_store_si256((__m256i*)pair, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
};

struct Tokens16 {
  using Sums = __m512;
  using Weights = __m512i;
  static constexpr int64_t kLanes = 16;
  static Weights four_groups(const uint8_t* weights) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)weights));
  }
  template <int kGroup>
  static Weights one_group(Weights four) {
    return _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(kGroup * 0x55));
  }
  static Sums add_dot(Sums sums, Weights two, const uint8_t* pair) {
    return _mm512_dpbf16_ps(sums, (__m512bh)two, (__m512bh)_mm512_load_si512(pair));
  }
  static void store_pair(const uint16_t* a, const uint16_t* b, uint32_t* pair) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    _mm512_store_si512(pair, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

// The work space of one thread.
struct Scratch {
  alignas(64) uint32_t pairs[kChunkTiles * kGroups * kSlots * kBlockTokens];
  alignas(64) float sums[kPassTokens * kSlabRows * kTileRows];  // [block][tile row][row][lanes]
  alignas(64) uint16_t out[kBlockTokens][kSlabRows * kTileRows];
};

// The pair rows of some tiles of K: slot `code - kFirstCode` of a group holds, a token per lane,
// (x_a, x_b) of the two columns that the four position bits `code` mean.
template <typename Register, int kRegisters>
void lay_out_pairs(const uint16_t* columns, int64_t num_tiles, uint32_t* pairs) {
  constexpr int64_t lanes = kRegisters * Register::kLanes;
  for (int64_t group = 0; group < num_tiles * kGroups; ++group, pairs += kSlots * lanes)
    for (int64_t lane = 0; lane < lanes; lane += Register::kLanes)
      for (int a = 0; a < 4; ++a)
        for (int b = a + 1; b < 4; ++b)
          Register::store_pair(columns + (group * 4 + a) * lanes + lane,
                               columns + (group * 4 + b) * lanes + lane,
                               pairs + ((a | b << 2) - kFirstCode) * lanes + lane);
}

// Adds a tile row's tiles of one chunk, times one block of tokens, to its [8][lanes] sums. Vector
// loads are the bottleneck, so the codes are kept in eight scalar registers and the weights of four
// groups are loaded at once. As many bytes as are read are prefetched at `ahead`.
template <typename Register, int kRegisters, Prefetch kPrefetch>
void add_tiles(const uint8_t* tile, int64_t num_tiles, const uint32_t* pairs, float* kept_sums,
               const uint8_t* ahead) {
  constexpr int64_t lanes = kRegisters * Register::kLanes, row_bytes = lanes * 4;
  constexpr int kShift = std::countr_zero(static_cast<uint64_t>(row_bytes));
  auto* kept = reinterpret_cast<typename Register::Sums*>(kept_sums);
  typename Register::Sums sums[kTileRows][2] = {};  // also with one register: independent sums
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r) sums[row][r] = kept[row * kRegisters + r];

  const uint8_t* tile_pairs = reinterpret_cast<const uint8_t*>(pairs) - kFirstCode * row_bytes;
  for (; num_tiles > 0; --num_tiles) {
    uint64_t codes[kTileRows];
    std::memcpy(codes, tile + kTileRows * kTileKept * 2, sizeof(codes));
    const auto four_groups = [&]<int kFour>() {
      prefetch<kFour == 0 ? 3 : 2, kPrefetch>(ahead + (kFour ? kFour * 2 + 1 : 0) * 64);
      typename Register::Weights weights[kTileRows];
#pragma GCC unroll 8
      for (int row = 0; row < kTileRows; ++row)
        weights[row] = Register::four_groups(tile + row * kTileKept * 2 + kFour * 16);
      const auto one_group = [&]<int kGroup>() {
        constexpr int group = kFour * 4 + kGroup;
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row) {
          const auto two = Register::template one_group<kGroup>(weights[row]);
          const uint8_t* pair = tile_pairs + group * kSlots * row_bytes +
                                (std::rotr(codes[row], 4 * group - kShift) & (15 << kShift));
#pragma GCC unroll 2
          for (int r = 0; r < kRegisters; ++r) {
            auto& sum = sums[row][kRegisters == 2 ? r : group % 2];
            sum = Register::add_dot(sum, two, pair + r * Register::kLanes * 4);
          }
        }
      };
      one_group.template operator()<0>();
      one_group.template operator()<1>();
      one_group.template operator()<2>();
      one_group.template operator()<3>();
    };
    four_groups.template operator()<0>();
    four_groups.template operator()<1>();
    four_groups.template operator()<2>();
    four_groups.template operator()<3>();
    tile += kTileBytes, ahead += kTileBytes;
    tile_pairs += kGroups * kSlots * row_bytes;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; ++r)
      kept[row * kRegisters + r] = kRegisters == 2 ? sums[row][r] : sums[row][0] + sums[row][1];
}

// One chunk of K of the slab's tile rows, times one block of tokens.
template <typename Register, int kRegisters>
void add_chunk(const Linear24& p, const uint16_t* columns, int64_t chunk, int64_t slab,
               int64_t slab_end, bool is_first_block, Scratch& scratch, float* sums) {
  constexpr int64_t lanes = kRegisters * Register::kLanes;
  const int64_t row_tiles = p.num_tile_columns(), tiles = std::min(row_tiles - chunk, kChunkTiles);
  lay_out_pairs<Register, kRegisters>(columns + chunk * kTileColumns * lanes, tiles, scratch.pairs);
  for (int64_t row = slab; row < slab_end; ++row, sums += kTileRows * lanes) {
    const uint8_t* tile = p.packed + (row * row_tiles + chunk) * kTileBytes;
    if (is_first_block) {  // for the other blocks the weights are in the cache already
      int64_t row_ahead = row + kRowsAhead, chunk_ahead = chunk;
      if (row_ahead >= slab_end) row_ahead -= slab_end - slab, chunk_ahead += kChunkTiles;
      const uint8_t* ahead = p.packed + (row_ahead * row_tiles + chunk_ahead) * kTileBytes;
      const auto add = p.tuning.prefetch == Prefetch::kT1
                           ? add_tiles<Register, kRegisters, Prefetch::kT1>
                           : add_tiles<Register, kRegisters, Prefetch::kT0>;
      add(tile, tiles, scratch.pairs, sums, ahead);
    } else {
      add_tiles<Register, kRegisters, Prefetch::kNone>(tile, tiles, scratch.pairs, sums, tile);
    }
  }
}

// The slab's sums of one block of tokens -> bf16, with bias.
inline void store_block(const Linear24& p, int64_t slab, int64_t slab_end, int64_t first_token,
                        const float* sums, Scratch& scratch) {
  const int64_t tokens = std::min(p.num_tokens - first_token, kBlockTokens);
  const int64_t lanes = lanes_of(tokens), first_n = slab * kTileRows;
  for (int64_t row = slab; row < slab_end; ++row, sums += kTileRows * lanes) {
    const int64_t n = row * kTileRows;
    const __m256 bias = p.bias
                            ? _mm256_maskz_loadu_ps(first_of_eight(p.out_features - n), p.bias + n)
                            : _mm256_setzero_ps();
    for (int64_t lane = 0; lane < lanes; lane += 8) {
      __m256 rows[8], out[8];
      for (int i = 0; i < 8; ++i) rows[i] = _mm256_load_ps(sums + i * lanes + lane);
      transpose_8x8(rows, out);
      for (int i = 0; i < 8; ++i)
        _mm_store_si128(reinterpret_cast<__m128i*>(&scratch.out[lane + i][n - first_n]),
                        (__m128i)_mm256_cvtneps_pbh(_mm256_add_ps(out[i], bias)));
    }
  }
  // Copied in long pieces: written tile by tile, out rows 4 KiB apart would share one cache set.
  const int64_t last_n = std::min(slab_end * kTileRows, p.out_features);
  for (int64_t i = 0; i < tokens; ++i)
    std::memcpy(static_cast<uint16_t*>(p.out) + (first_token + i) * p.out_features + first_n,
                scratch.out[i], (last_n - first_n) * 2);
}

inline void run_many(const Linear24& p, const uint16_t* columns, int64_t begin, int64_t end) {
  const int64_t row_tiles = p.num_tile_columns(), padded_k = row_tiles * kTileColumns;
  constexpr int64_t lane_sums = kSlabRows * kTileRows;  // of one token
  Scratch scratch;
  for (int64_t slab = begin; slab < end; slab += kSlabRows) {
    const int64_t slab_end = std::min(slab + kSlabRows, end);
    for (int64_t first = 0; first < p.num_tokens; first += kPassTokens) {
      const int64_t pass_end = std::min(first + kPassTokens, p.num_tokens);
      const int64_t last = first + (pass_end - 1 - first) / kBlockTokens * kBlockTokens;
      const int64_t pass_lanes = last - first + lanes_of(pass_end - last);
      std::memset(scratch.sums, 0, pass_lanes * lane_sums * sizeof(float));
      for (int64_t chunk = 0; chunk < row_tiles; chunk += kChunkTiles)
        for (int64_t token = first; token < pass_end; token += kBlockTokens) {
          const int64_t lanes = lanes_of(pass_end - token);
          const auto add = lanes == 8    ? add_chunk<Tokens8, 1>
                           : lanes == 16 ? add_chunk<Tokens16, 1>
                                         : add_chunk<Tokens16, 2>;
          add(p, columns + token * padded_k, chunk, slab, slab_end, token == first, scratch,
              scratch.sums + (token - first) * lane_sums);
        }
      for (int64_t token = first; token < pass_end; token += kBlockTokens)
        store_block(p, slab, slab_end, token, scratch.sums + (token - first) * lane_sums, scratch);
    }
  }
}

inline int64_t many_bytes(const Linear24& p) {
  const int64_t whole = p.num_tokens / kBlockTokens * kBlockTokens, left = p.num_tokens - whole;
  return (whole + (left ? lanes_of(left) : 0)) * p.num_tile_columns() * kTileColumns * 2;
}

}  // namespace
}  // namespace cast
