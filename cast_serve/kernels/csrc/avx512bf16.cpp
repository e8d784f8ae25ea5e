// The 2:4 linear for x86 with AVX-512 BF16 and VBMI; other dtypes than bf16 take avx512.cpp's.
//
// Few tokens (decode): memory-bound, so the weights are read once as they lie. A row's 64 position
// bits become 32 column numbers (multishift, one ternary logic), two registers of x are permuted by
// them, and one vdpbf16ps multiplies 32 kept weights, that is 64 dense ones.
//
// Many tokens: compute-bound, so the dropped weights must cost nothing. For every group of four
// columns the six pairs (x_a, x_b) that two kept weights can meet are laid out once, 16 tokens in a
// register; then a group of a row is one vdpbf16ps per 16 tokens: its two weights broadcast, times
// the pair row that its positions choose. K is cut in chunks whose pair rows stay in L1.
#include <immintrin.h>

#include <cstring>

#include "linear24.h"

namespace cast {
namespace {

constexpr int64_t kTileBytes = kTileRows * (kTileKept * 2 + 8);
constexpr int64_t kFewTokens = 4;  // up to here: gather the activations
constexpr int64_t kGroups = kTileColumns / 4;
constexpr int64_t kFirstCode = 4;   // a group's four position bits: 4, 8, 9, 12, 13 or 14
constexpr int64_t kSlots = 11;      // of pair rows per group, indexed by them; six are used
constexpr int64_t kChunkTiles = 2;  // tiles of K whose pair rows stay in L1
constexpr int64_t kSlabRows = 32;   // tile rows whose sums stay in L2 meanwhile
// Tiles fetched ahead. The CPU's own prefetch stops at every 4 KiB page, so without this a decode
// runs at two thirds of the read bandwidth (docs/kernels.md).
constexpr int64_t kTilesAhead = 8;

// Tokens that one pass over the weights serves.
int64_t lanes_of(const Linear24& p) { return p.num_tokens <= 8 ? 8 : p.num_tokens <= 16 ? 16 : 32; }

void prefetch(const uint8_t* bytes, int64_t num_bytes) {
  for (int64_t line = 0; line < num_bytes; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(bytes + line), _MM_HINT_T0);
}

bool is_few(const Linear24& p) { return p.num_tokens <= kFewTokens; }

// --- few tokens ------------------------------------------------------------------------------

void prepare_few(const Linear24& p, uint16_t* rows) {
  const int64_t padded_k = p.num_tile_columns() * kTileColumns;
  for (int64_t token = 0; token < p.num_tokens; ++token, rows += padded_k) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
    std::memcpy(rows, x, p.in_features * 2);
    std::memset(rows + p.in_features, 0, (padded_k - p.in_features) * 2);
  }
}

template <int kTokens, int kRows>
void run_few(const Linear24& p, const uint16_t* x, int64_t begin, int64_t end) {
  alignas(64) uint8_t shifts[64];
  alignas(64) uint16_t bases[32];
  for (int j = 0; j < 32; ++j) {
    shifts[2 * j] = shifts[2 * j + 1] = 2 * j;
    bases[j] = j / 2 * 4;
  }
  const __m512i shift = _mm512_load_si512(shifts), base = _mm512_load_si512(bases);
  const __m512i three = _mm512_set1_epi16(3);
  const int64_t num_tiles = p.num_tile_columns(), padded_k = num_tiles * kTileColumns;

  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    for (int half = 0; half < kTileRows; half += kRows) {
      const uint8_t* tile = p.packed + tile_row * num_tiles * kTileBytes;
      __m512 sums[kRows][kTokens];
      for (int row = 0; row < kRows; ++row)
        for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm512_setzero_ps();
      for (int64_t k = 0; k < padded_k; k += kTileColumns, tile += kTileBytes) {
        if (half == 0) prefetch(tile + kTilesAhead * kTileBytes, kTileBytes);
        __m512i low[kTokens], high[kTokens];
        for (int token = 0; token < kTokens; ++token) {
          low[token] = _mm512_loadu_si512(x + token * padded_k + k);
          high[token] = _mm512_loadu_si512(x + token * padded_k + k + 32);
        }
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const __m512i values = _mm512_load_si512(tile + (half + row) * kTileKept * 2);
          int64_t bits;
          std::memcpy(&bits, tile + kTileRows * kTileKept * 2 + (half + row) * 8, 8);
          const __m512i shifted = _mm512_multishift_epi64_epi8(shift, _mm512_set1_epi64(bits));
          const __m512i column =
              _mm512_ternarylogic_epi32(shifted, three, base, 0xEA);  // (a & 3) | base
#pragma GCC unroll 4
          for (int token = 0; token < kTokens; ++token) {
            const __m512i gathered = _mm512_permutex2var_epi16(low[token], column, high[token]);
            sums[row][token] =
                _mm512_dpbf16_ps(sums[row][token], (__m512bh)gathered, (__m512bh)values);
          }
        }
      }
      for (int row = 0; row < kRows; ++row) {
        const int64_t n = tile_row * kTileRows + half + row;
        if (n >= p.out_features) break;
        for (int token = 0; token < kTokens; ++token) {
          const float sum = _mm512_reduce_add_ps(sums[row][token]) + (p.bias ? p.bias[n] : 0.0f);
          const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(sum));
          std::memcpy(static_cast<uint16_t*>(p.out) + token * p.out_features + n, &rounded, 2);
        }
      }
    }
  }
}

// --- many tokens -----------------------------------------------------------------------------

// x -> [token block][K][lanes], so that a column of a block is one load.
void prepare_many(const Linear24& p, uint16_t* columns) {
  const int64_t lanes = lanes_of(p), padded_k = p.num_tile_columns() * kTileColumns;
  for (int64_t first = 0; first < p.num_tokens; first += lanes, columns += padded_k * lanes) {
    const int64_t tokens = p.num_tokens - first < lanes ? p.num_tokens - first : lanes;
    if (tokens < lanes || padded_k > p.in_features) std::memset(columns, 0, padded_k * lanes * 2);
    for (int64_t token = 0; token < tokens; ++token) {
      const uint16_t* x = static_cast<const uint16_t*>(p.x) + (first + token) * p.x_stride;
      for (int64_t k = 0; k < p.in_features; ++k) columns[k * lanes + token] = x[k];
    }
  }
}

// Eight or sixteen tokens in a register.
struct Tokens8 {
  using Sums = __m256;
  static constexpr int64_t kLanes = 8;
  static Sums load(const float* sums) { return _mm256_load_ps(sums); }
  static void store(float* out, Sums sums) { _mm256_store_ps(out, sums); }
  static Sums add_dot(Sums sums, const uint32_t* pair, int32_t two_weights) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(pair));
    return _mm256_dpbf16_ps(sums, (__m256bh)x, (__m256bh)_mm256_set1_epi32(two_weights));
  }
  static void store_pair(const uint16_t* a, const uint16_t* b, uint32_t* pair) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
    _mm256_store_si256((__m256i*)pair, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
};

struct Tokens16 {
  using Sums = __m512;
  static constexpr int64_t kLanes = 16;
  static Sums load(const float* sums) { return _mm512_load_ps(sums); }
  static void store(float* out, Sums sums) { _mm512_store_ps(out, sums); }
  static Sums add_dot(Sums sums, const uint32_t* pair, int32_t two_weights) {
    const __m512i x = _mm512_load_si512(pair);
    return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)_mm512_set1_epi32(two_weights));
  }
  static void store_pair(const uint16_t* a, const uint16_t* b, uint32_t* pair) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    _mm512_store_si512(pair, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

// The pair rows of some tiles of K: slot `code - kFirstCode` of a group holds, a token per lane,
// (x_a, x_b) of the two columns that the four position bits `code` mean.
template <typename Register, int kBlocks>
void lay_out_pairs(const uint16_t* columns, int64_t num_tiles, uint32_t* pairs) {
  constexpr int64_t lanes = kBlocks * Register::kLanes;
  for (int64_t group = 0; group < num_tiles * kGroups; ++group, pairs += kSlots * lanes)
    for (int64_t lane = 0; lane < lanes; lane += Register::kLanes)
      for (int a = 0; a < 4; ++a)
        for (int b = a + 1; b < 4; ++b)
          Register::store_pair(columns + (group * 4 + a) * lanes + lane,
                               columns + (group * 4 + b) * lanes + lane,
                               pairs + ((a | b << 2) - kFirstCode) * lanes + lane);
}

template <typename Register, int kBlocks>  // kBlocks registers of tokens at a time
void run_many(const Linear24& p, const uint16_t* columns, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kBlocks * Register::kLanes;
  const int64_t num_tiles = p.num_tile_columns();
  alignas(64) uint32_t pairs[kChunkTiles * kGroups * kSlots * lanes];
  alignas(64) float kept_sums[kSlabRows][kTileRows][lanes];

  for (int64_t first = 0; first < p.num_tokens;
       first += lanes, columns += num_tiles * kTileColumns * lanes) {
    const int64_t tokens = p.num_tokens - first < lanes ? p.num_tokens - first : lanes;
    for (int64_t slab = begin; slab < end; slab += kSlabRows) {
      const int64_t slab_end = slab + kSlabRows < end ? slab + kSlabRows : end;
      std::memset(kept_sums, 0, sizeof(kept_sums[0]) * (slab_end - slab));
      for (int64_t chunk = 0; chunk < num_tiles; chunk += kChunkTiles) {
        const int64_t tiles = num_tiles - chunk < kChunkTiles ? num_tiles - chunk : kChunkTiles;
        lay_out_pairs<Register, kBlocks>(columns + chunk * kTileColumns * lanes, tiles, pairs);
        for (int64_t tile_row = slab; tile_row < slab_end; ++tile_row) {
          auto& kept = kept_sums[tile_row - slab];
          typename Register::Sums sums[kTileRows][kBlocks];
#pragma GCC unroll 8
          for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 2
            for (int block = 0; block < kBlocks; ++block)
              sums[row][block] = Register::load(&kept[row][block * Register::kLanes]);
          const uint8_t* values = p.packed + (tile_row * num_tiles + chunk) * kTileBytes;
          prefetch(values + 2 * num_tiles * kTileBytes, tiles * kTileBytes);
          const uint32_t* group_pairs = pairs - kFirstCode * lanes;
          for (int64_t tile = 0; tile < tiles; ++tile, values += kTileBytes) {
            const uint8_t* positions = values + kTileRows * kTileKept * 2;
            for (int64_t two_groups = 0; two_groups < kGroups / 2; ++two_groups) {
#pragma GCC unroll 2
              for (int group = 0; group < 2; ++group) {
#pragma GCC unroll 8
                for (int row = 0; row < kTileRows; ++row) {  // rows inside: independent sums
                  const uint64_t codes = positions[row * 8 + two_groups];
                  const uint64_t code = group ? codes >> 4 : codes & 15;
                  const uint32_t* pair = group_pairs + (group * kSlots + code) * lanes;
                  int32_t two;
                  std::memcpy(&two, values + (row * kTileKept + two_groups * 4 + group * 2) * 2, 4);
#pragma GCC unroll 2
                  for (int block = 0; block < kBlocks; ++block)
                    sums[row][block] =
                        Register::add_dot(sums[row][block], pair + block * Register::kLanes, two);
                }
              }
              group_pairs += 2 * kSlots * lanes;
            }
          }
#pragma GCC unroll 8
          for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 2
            for (int block = 0; block < kBlocks; ++block)
              Register::store(&kept[row][block * Register::kLanes], sums[row][block]);
        }
      }
      for (int64_t tile_row = slab; tile_row < slab_end; ++tile_row) {
        const int64_t n = tile_row * kTileRows;
        const int64_t rows = p.out_features - n < kTileRows ? p.out_features - n : kTileRows;
        for (int64_t token = 0; token < tokens; ++token) {
          alignas(32) float sums[kTileRows] = {};
          for (int64_t row = 0; row < rows; ++row)
            sums[row] = kept_sums[tile_row - slab][row][token] + (p.bias ? p.bias[n + row] : 0.0f);
          const __m128bh rounded = _mm256_cvtneps_pbh(_mm256_load_ps(sums));
          std::memcpy(static_cast<uint16_t*>(p.out) + (first + token) * p.out_features + n,
                      &rounded, rows * 2);
        }
      }
    }
  }
}

// --- the two together ------------------------------------------------------------------------

int64_t workspace_bytes(const Linear24& p) {
  if (p.dtype != DType::kBFloat16) return kAvx512.workspace_bytes(p);
  const int64_t padded_k = p.num_tile_columns() * kTileColumns;
  if (is_few(p)) return p.num_tokens * padded_k * 2;
  const int64_t padded_m = (p.num_tokens + lanes_of(p) - 1) / lanes_of(p) * lanes_of(p);
  return padded_m * padded_k * 2;
}

void prepare(const Linear24& p, void* workspace) {
  if (p.dtype != DType::kBFloat16) return kAvx512.prepare(p, workspace);
  if (is_few(p)) return prepare_few(p, static_cast<uint16_t*>(workspace));
  return prepare_many(p, static_cast<uint16_t*>(workspace));
}

void run(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.dtype != DType::kBFloat16) return kAvx512.run(p, workspace, begin, end);
  const uint16_t* x = static_cast<const uint16_t*>(workspace);
  switch (p.num_tokens) {
    case 1:
      return run_few<1, 8>(p, x, begin, end);
    case 2:
      return run_few<2, 8>(p, x, begin, end);
    case 3:
      return run_few<3, 4>(p, x, begin, end);
    case 4:
      return run_few<4, 4>(p, x, begin, end);
    default:
      if (p.num_tokens <= 8) return run_many<Tokens8, 1>(p, x, begin, end);
      if (p.num_tokens <= 16) return run_many<Tokens16, 1>(p, x, begin, end);
      return run_many<Tokens16, 2>(p, x, begin, end);
  }
}

bool is_supported() {
  return kAvx512.is_supported() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const Kernel kAvx512Bf16 = {"avx512_bf16", is_supported, workspace_bytes, prepare, run};

}  // namespace cast
