// The kernel for many tokens of avx512vnni.cpp.
//
// Compute-bound, so the dropped weights must cost nothing. For every eight columns (an octet: two
// groups) there are 6 x 6 ways in which four kept weights can meet four activations. These are laid
// out once, a token per 32-bit lane ("quads"). Then eight columns of a row are one vpdpbusd per 16
// tokens: its four weights, broadcast, times the quad that its byte of positions chooses. A tile
// has the columns of a scale group. After it the integer sums become float, are multiplied with the
// tokens' scales and added to sums in L2. The quads of a tile are 36 KB; half a tile at a time,
// which stays in L1, was slower on Zen 4, since the sums are then read and written twice.
//
// As for few tokens, x + 128 is stored, and a row's sums begin at -128 times its weights.
//
// 4-bit weights become 8-bit ones when the first block of tokens meets their tile. Their sums are
// scaled after every scale group, of which a tile has 1, 2 or 4.
#pragma once
#include <bit>
#include <cstring>

#include "avx512vnni_int4.h"
#include "avx512vnni_x.h"

namespace cast {
namespace {

constexpr int64_t kInt8SlabRows = 128;    // tile rows whose sums stay in L2 meanwhile
constexpr int64_t kInt8BlockTokens = 16;  // tokens that share one set of quads
constexpr int64_t kInt8PassTokens = 4 * kInt8BlockTokens;  // tokens whose sums stay in L2
// Of a token's outputs, and a line more, or all tokens' would share one cache set.
constexpr int64_t kInt8LineBytes = kInt8SlabRows * kTileRows * 4 + 64;
constexpr int64_t kQuads = 36;
constexpr int64_t kTileOctets = kInt8TileColumns / 8;

// The tokens are cut in blocks of 16; the last one has 8 or 16 lanes.
inline int64_t int8_lanes_of(int64_t tokens) { return tokens <= 8 ? 8 : kInt8BlockTokens; }

inline int64_t int8_padded_tokens(const Linear24& p) {
  const int64_t whole = p.num_tokens / kInt8BlockTokens * kInt8BlockTokens;
  return whole + (p.num_tokens > whole ? int8_lanes_of(p.num_tokens - whole) : 0);
}

// x -> [block][K / 4][lanes] times 4 integers, then the scales, [block][scale group][lanes].
inline int64_t int8_many_bytes(const Linear24& p) {
  return int8_padded_tokens(p) * p.num_int8_tile_columns() * (kInt8TileColumns + 4);
}

inline const float* int8_many_scales(const Linear24& p, const void* workspace) {
  const uint8_t* integers = static_cast<const uint8_t*>(workspace);
  const int64_t padded_k = p.num_int8_tile_columns() * kInt8TileColumns;
  return reinterpret_cast<const float*>(integers + int8_padded_tokens(p) * padded_k);
}

// rows[i][j] -> to[j][i], of 16 x 16 words; rows `stride` bytes apart.
inline void lay_out_fours(const uint8_t* rows, int64_t stride, uint32_t* to) {
  __m512i words[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(rows + i * stride);
  transpose_16x16(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, words[i]);
}

inline void prepare_int8_many(const Linear24& p, void* workspace) {
  constexpr int64_t kTileFours = kInt8TileColumns / 4;
  const int64_t groups = p.num_int8_tile_columns(), size = element_bytes(p.dtype);
  float* all_scales = const_cast<float*>(int8_many_scales(p, workspace));
  alignas(64) uint8_t rows[kInt8BlockTokens][kInt8TileColumns];
  for (int64_t first = 0; first < p.num_tokens; first += kInt8BlockTokens) {
    const int64_t lanes = int8_lanes_of(p.num_tokens - first);
    const int64_t tokens = std::min(p.num_tokens - first, lanes);
    uint32_t* fours = static_cast<uint32_t*>(workspace) + first * groups * kTileFours;
    float* scales = all_scales + first * groups;
    for (int64_t group = 0; group < groups; ++group, fours += kTileFours * lanes, scales += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (lane >= tokens) {
          std::memset(rows[lane], kZero, kInt8TileColumns);
          scales[lane] = 0;
          continue;
        }
        // So many rows at once are more than a CPU prefetches by itself.
        const int64_t next = (first + lane) * p.x_stride + (group + 1) * kInt8TileColumns;
        for (int64_t byte = 0; byte < kInt8TileColumns * size; byte += 64)
          _mm_prefetch(static_cast<const char*>(p.x) + next * size + byte, _MM_HINT_T0);
        scales[lane] = quantize(p, first + lane, group, rows[lane]);
      }
      if (lanes == 16) {
        lay_out_fours(rows[0], sizeof(rows[0]), fours);
        lay_out_fours(rows[0] + 64, sizeof(rows[0]), fours + 16 * 16);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t i = 0; i < kTileFours; ++i)
            std::memcpy(fours + i * lanes + lane, rows[lane] + 4 * i, 4);
      }
    }
  }
}

// Eight or sixteen tokens in a register.
struct Int8Tokens8 {
  using Integers = __m256i;
  static constexpr int64_t kLanes = 8;
  static Integers all(int32_t value) { return _mm256_set1_epi32(value); }
  static Integers four_octets(const uint8_t* weights) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)weights));
  }
  template <int kOctet>
  static Integers one_octet(Integers four) {
    return _mm256_shuffle_epi32(four, kOctet * 0x55);
  }
  static Integers add_dot(Integers sums, const uint8_t* quad, Integers weights) {
    return _mm256_dpbusd_epi32(sums, _mm256_load_si256((const __m256i*)quad), weights);
  }
  using Floats = __m256;
  static Floats load(const float* floats) { return _mm256_loadu_ps(floats); }
  static Floats times(Floats floats, float by) { return _mm256_mul_ps(floats, _mm256_set1_ps(by)); }
  static void add_scaled(float* sums, Integers dots, Floats scales) {
    _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scales, _mm256_load_ps(sums)));
  }
  static Integers load(const uint32_t* fours) { return _mm256_loadu_si256((const __m256i*)fours); }
  static Integers shuffled(Integers fours, uint32_t bytes) {
    return _mm256_shuffle_epi8(fours, _mm256_add_epi32(all(bytes), lane_offsets()));
  }
  static void store_quad(Integers low, Integers high, uint8_t* quad) {
    _mm256_store_si256((__m256i*)quad, _mm256_or_si256(low, high));
  }
  static Integers lane_offsets() {  // of a lane's first byte, in each of its four
    return _mm256_broadcastsi128_si256(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  }
};

struct Int8Tokens16 {
  using Integers = __m512i;
  static constexpr int64_t kLanes = 16;
  static Integers all(int32_t value) { return _mm512_set1_epi32(value); }
  static Integers four_octets(const uint8_t* weights) {
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)weights));
  }
  template <int kOctet>
  static Integers one_octet(Integers four) {
    return _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(kOctet * 0x55));
  }
  static Integers add_dot(Integers sums, const uint8_t* quad, Integers weights) {
    return _mm512_dpbusd_epi32(sums, _mm512_load_si512(quad), weights);
  }
  using Floats = __m512;
  static Floats load(const float* floats) { return _mm512_loadu_ps(floats); }
  static Floats times(Floats floats, float by) { return _mm512_mul_ps(floats, _mm512_set1_ps(by)); }
  static void add_scaled(float* sums, Integers dots, Floats scales) {
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scales, _mm512_load_ps(sums)));
  }
  static Integers load(const uint32_t* fours) { return _mm512_loadu_si512(fours); }
  static Integers shuffled(Integers fours, uint32_t bytes) {
    return _mm512_shuffle_epi8(fours, _mm512_add_epi32(all(bytes), lane_offsets()));
  }
  static void store_quad(Integers low, Integers high, uint8_t* quad) {
    _mm512_store_si512(quad, _mm512_or_si512(low, high));
  }
  static Integers lane_offsets() {
    return _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  }
};

// A tile of each tile row of a slab: what all blocks of tokens need of it beside its values.
struct TileCodes {
  alignas(64) uint8_t quads[kTileRows][kTileOctets];  // which of the 36
  // -128 times the sum of a row's weights, of each scale group.
  alignas(64) int32_t starts[kMostScaleGroups][kTileRows];
};

// A tile of 4-bit weights, as 8-bit ones.
struct Int4Tile {
  alignas(64) uint8_t values[kTileRows][kInt8TileKept];
  alignas(64) float scales[kMostScaleGroups][kTileRows];
};

// The work space of one thread.
template <Weights kWeights>
struct Int8Scratch {
  alignas(64) uint8_t quads[kTileOctets * kQuads * kInt8BlockTokens * 4];
  alignas(64) float sums[kInt8PassTokens * kInt8SlabRows * kTileRows];  // [block][n][lanes]
  TileCodes codes[kInt8SlabRows];
  Int4Tile int4[kWeights == Weights::kInt4 ? kInt8SlabRows : 1];
  alignas(64) uint8_t out[kInt8BlockTokens][kInt8LineBytes];
};

// The quads of a tile: number 6 * i + j of an octet has the i-th pair of its second group of
// columns and the j-th of its first; the pairs in the order of kPairs.
constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};

template <typename Register>
void lay_out_quads(const uint32_t* fours, uint8_t* quads) {
  constexpr int64_t lanes = Register::kLanes;
  for (int64_t octet = 0; octet < kTileOctets; ++octet, fours += 2 * lanes) {
    const auto first = Register::load(fours), second = Register::load(fours + lanes);
    typename Register::Integers low[6], high[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {  // a byte with its highest bit set becomes 0
      const uint32_t pair = kPairs[i][0] | kPairs[i][1] << 8;
      low[i] = Register::shuffled(first, 0x80800000 | pair);
      high[i] = Register::shuffled(second, pair << 16 | 0x8080);
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j, quads += lanes * 4) Register::store_quad(low[j], high[i], quads);
  }
}

// Four position bits -> the number of their pair, times `factor`, in each of 16 bytes.
inline __m512i pair_numbers(int factor) {
  alignas(16) uint8_t numbers[16] = {};
  for (int i = 0; i < 6; ++i) numbers[kPairs[i][0] | kPairs[i][1] << 2] = i * factor;
  return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)numbers));
}

// values, [8][64] bytes: of the tile, or what find_int4_codes made of them.
template <int kGroups>
void find_codes(const uint8_t* values, const uint8_t* positions, TileCodes& codes) {
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_loadu_si512(positions + i * 64);
    const __m512i first = _mm512_and_si512(both, nibble);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(codes.quads[i * 4],
                       _mm512_add_epi8(_mm512_shuffle_epi8(pair_numbers(1), first),
                                       _mm512_shuffle_epi8(pair_numbers(6), second)));
  }
  __m512i sums[8];
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row)
    sums[row] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(kZero),
                                    _mm512_load_si512(values + row * kInt8TileKept));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2)
    sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[i], sums[i + 1]),
                               _mm512_unpackhi_epi32(sums[i], sums[i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi64(sums[i], sums[i + 2]),
                                   _mm512_unpackhi_epi64(sums[i], sums[i + 2]));
    // Each quarter has rows i to i + 3, of a quarter of the columns. Those of a group are added.
    if constexpr (kGroups < 4) sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4(sum, sum, 0xB1));
    if constexpr (kGroups < 2) sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4(sum, sum, 0x4E));
    sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
    alignas(64) int32_t quarters[4][4];
    _mm512_store_si512(quarters, sum);
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group)
      std::memcpy(codes.starts[group] + i, quarters[group * 4 / kGroups], 16);
  }
}

template <int kGroups>
void find_int4_codes(const uint8_t* tile, Int4Tile& int4, TileCodes& codes) {
#pragma GCC unroll 8
  for (int row = 0; row < kTileRows; ++row)
    _mm512_store_si512(int4.values[row], int4_weights_in_order(tile + row * kInt4RowBytes));
  read_int4_scales<kGroups>(tile, int4.scales[0], kTileRows);
  find_codes<kGroups>(int4.values[0], tile + kInt4PositionsAt, codes);
}

// Adds a tile, times one block of tokens, to its tile row's [8][lanes] sums. Vector
// loads are the bottleneck, so the codes are kept in eight scalar registers and the weights of four
// octets are loaded at once. row_scales: of 4-bit weights, [group][8].
template <typename Register, Weights kWeights, int kGroups>
inline void add_tile(const uint8_t* values, const TileCodes& codes, const uint8_t* quads,
                     const float* scales, const float* row_scales, float* sums) {
  constexpr int64_t row_bytes = Register::kLanes * 4;
  constexpr int kShift = std::countr_zero(static_cast<uint64_t>(row_bytes));
  constexpr int kGroupQuarters = 4 / kGroups;
  typename Register::Integers dots[kTileRows];

  const auto eight_octets = [&]<int kEight>() {
    uint64_t numbers[kTileRows];
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row)
      std::memcpy(&numbers[row], codes.quads[row] + kEight * 8, 8);
    const auto four_octets = [&]<int kFour>() {
      constexpr int kQuarter = kEight * 2 + kFour, kGroup = kQuarter / kGroupQuarters;
      if constexpr (kQuarter % kGroupQuarters == 0) {
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row)
          dots[row] = Register::all(codes.starts[kGroup][row]);
      }
      typename Register::Integers weights[kTileRows];
#pragma GCC unroll 8
      for (int row = 0; row < kTileRows; ++row)
        weights[row] = Register::four_octets(values + row * kInt8TileKept + kQuarter * 16);
      const auto one_octet = [&]<int kOctet>() {
        constexpr int in_eight = kFour * 4 + kOctet;
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row) {
          const uint8_t* quad = quads + (kEight * 8 + in_eight) * kQuads * row_bytes +
                                (std::rotr(numbers[row], 8 * in_eight - kShift) & (63 << kShift));
          dots[row] = Register::add_dot(dots[row], quad,
                                        Register::template one_octet<kOctet>(weights[row]));
        }
      };
      one_octet.template operator()<0>();
      one_octet.template operator()<1>();
      one_octet.template operator()<2>();
      one_octet.template operator()<3>();
      if constexpr ((kQuarter + 1) % kGroupQuarters == 0) {
        const typename Register::Floats token_scales = Register::load(scales);
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row)
          Register::add_scaled(
              sums + row * Register::kLanes, dots[row],
              kWeights == Weights::kInt4
                  ? Register::times(token_scales, row_scales[kGroup * kTileRows + row])
                  : token_scales);
      }
    };
    four_octets.template operator()<0>();
    four_octets.template operator()<1>();
  };
  eight_octets.template operator()<0>();
  eight_octets.template operator()<1>();
}

// Tile `tile` of the slab's tile rows, times one block of tokens.
template <typename Register, Weights kWeights, int kGroups>
void add_tile_column(const Linear24& p, const uint32_t* fours, const float* scales, int64_t tile,
                     int64_t slab, int64_t slab_end, bool is_first_block,
                     Int8Scratch<kWeights>& scratch, float* sums) {
  constexpr bool kIsInt4 = kWeights == Weights::kInt4;
  constexpr int kLines = kIsInt4 ? 7 : kInt8TileBytes / 64;
  const int64_t tile_bytes = kIsInt4 ? p.int4_tile_bytes() : kInt8TileBytes;
  const int64_t row_bytes = p.num_int8_tile_columns() * tile_bytes, rows = slab_end - slab;
  const uint8_t* at = p.packed + slab * row_bytes + tile * tile_bytes;
  // Of a single block of tokens only this tile row's and the next one's codes are needed.
  const int64_t slots = p.num_tokens <= kInt8BlockTokens ? 2 : kInt8SlabRows;  // powers of two
  const auto find = [&](const uint8_t* from, int64_t slot) {
    if constexpr (kIsInt4)
      find_int4_codes<kGroups>(from, scratch.int4[slot], scratch.codes[slot]);
    else
      find_codes<kGroups>(from, from + kTileRows * kInt8TileKept, scratch.codes[slot]);
  };
  lay_out_quads<Register>(fours, scratch.quads);
  if (is_first_block) find(at, 0);
  for (int64_t row = 0; row < rows; ++row, at += row_bytes, sums += kTileRows * Register::kLanes) {
    const int64_t slot = row & (slots - 1);
    if (is_first_block) {  // later blocks have the weights in the cache already
      if (row + 1 < rows) find(at + row_bytes, (row + 1) & (slots - 1));
      if (p.tuning.prefetch == Prefetch::kT0)
        prefetch<kLines, Prefetch::kT0>(at + tile_bytes);
      else
        prefetch<kLines, Prefetch::kT1>(at + tile_bytes);
    }
    if constexpr (kIsInt4) {
      const Int4Tile& int4 = scratch.int4[slot];
      add_tile<Register, kWeights, kGroups>(int4.values[0], scratch.codes[slot], scratch.quads,
                                            scales, int4.scales[0], sums);
    } else {
      add_tile<Register, kWeights, kGroups>(at, scratch.codes[slot], scratch.quads, scales, nullptr,
                                            sums);
    }
  }
}

// The slab's sums of one block of tokens -> x's dtype, with scale and bias.
inline void store_int8_block(const Linear24& p, int64_t slab, int64_t slab_end, int64_t first_token,
                             const float* sums, uint8_t (*lines)[kInt8LineBytes]) {
  const int64_t tokens = std::min(p.num_tokens - first_token, kInt8BlockTokens);
  const int64_t lanes = int8_lanes_of(tokens), first_n = slab * kTileRows;
  const int64_t size = element_bytes(p.dtype);
  for (int64_t row = slab; row < slab_end; ++row, sums += kTileRows * lanes) {
    const int64_t n = row * kTileRows;
    const __mmask8 inside = first_of_eight(p.out_features - n);
    const __m256 scale =
        p.scale ? _mm256_maskz_loadu_ps(inside, p.scale + n) : _mm256_set1_ps(1.0f);
    const __m256 bias = p.bias ? _mm256_maskz_loadu_ps(inside, p.bias + n) : _mm256_setzero_ps();
    for (int64_t lane = 0; lane < lanes; lane += 8) {
      __m256 rows[8], out[8];
      for (int i = 0; i < 8; ++i) rows[i] = _mm256_load_ps(sums + i * lanes + lane);
      transpose_8x8(rows, out);
      for (int i = 0; i < 8; ++i)
        store_8(p.dtype, _mm256_fmadd_ps(out[i], scale, bias),
                lines[lane + i] + (n - first_n) * size);
    }
  }
  // Copied in long pieces: written tile by tile, out rows 4 KiB apart would share one cache set.
  const int64_t last_n = std::min(slab_end * kTileRows, p.out_features);
  uint8_t* out = static_cast<uint8_t*>(p.out) + (first_token * p.out_features + first_n) * size;
  for (int64_t i = 0; i < tokens; ++i)
    std::memcpy(out + i * p.out_features * size, lines[i], (last_n - first_n) * size);
}

template <Weights kWeights, int kGroups>
void run_int8_many(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  const uint32_t* fours = static_cast<const uint32_t*>(workspace);
  const float* scales = int8_many_scales(p, workspace);
  const int64_t tiles = p.num_int8_tile_columns();
  constexpr int64_t tile_fours = kInt8TileColumns / 4;
  constexpr int64_t lane_sums = kInt8SlabRows * kTileRows;  // of one token
  Int8Scratch<kWeights> scratch;
  for (int64_t slab = begin; slab < end; slab += kInt8SlabRows) {
    const int64_t slab_end = std::min(slab + kInt8SlabRows, end);
    for (int64_t first = 0; first < p.num_tokens; first += kInt8PassTokens) {
      const int64_t pass_end = std::min(first + kInt8PassTokens, p.num_tokens);
      std::memset(scratch.sums, 0, (pass_end - first + 15) / 16 * 16 * lane_sums * sizeof(float));
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t token = first; token < pass_end; token += kInt8BlockTokens) {
          const int64_t lanes = int8_lanes_of(pass_end - token);
          const uint32_t* x = fours + (token * tiles * tile_fours) + tile * tile_fours * lanes;
          const float* x_scales = scales + token * tiles + tile * lanes;
          float* sums = scratch.sums + (token - first) * lane_sums;
          const bool is_first = token == first;
          const auto add = lanes == 8 ? add_tile_column<Int8Tokens8, kWeights, kGroups>
                                      : add_tile_column<Int8Tokens16, kWeights, kGroups>;
          add(p, x, x_scales, tile, slab, slab_end, is_first, scratch, sums);
        }
      for (int64_t token = first; token < pass_end; token += kInt8BlockTokens)
        store_int8_block(p, slab, slab_end, token, scratch.sums + (token - first) * lane_sums,
                         scratch.out);
    }
  }
}

}  // namespace
}  // namespace cast
