// One 2:4 linear as plain pointers: what every ISA's kernel takes. No torch in here.
//
// The packed weight is a sequence of tiles, tile row by tile row, each 8 out_features x 64
// in_features:
//
//     values     8 rows x 32 kept weights, row after row        8 x 32 x sizeof(weight) bytes
//     positions  8 rows x 64 bits, row after row                64 bytes
//
//     one row's positions: 16 groups x 4 bits, group 0 in the lowest bits
//         bits 0-1: column inside the group of its first kept weight, bits 2-3: of its second
//
// A tile is read as one stream: 576 bytes of 16-bit weights, for 1024 dense bytes. A tile of int8
// weights has 8 x 128: 8 rows x 64 kept weights, then 8 rows x 128 bits, 640 bytes. N and K are
// padded to whole tiles with zero values at columns 0 and 1. Letters: M tokens, N out_features, K
// in_features.
//
// A dense int8 weight (the head) has tiles of 8 x 128 too: 8 rows x 128 weights, 1024 bytes.
//
// A tile of 4-bit weights is 8 x 128: 8 rows x 32 bytes of two kept weights each, 8 rows x 128
// bits, then 8 rows of bf16 scales, one for each scale group of the weight. reference_int4.py says
// where in its row a weight lies.
#pragma once
#include <cstdint>

namespace cast {

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileRows64 = 16;  // of weights that keep n of 64
constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileKept = kTileColumns / 2;

constexpr int64_t kInt8TileColumns = 128;  // also the columns of a scale group of x
constexpr int64_t kInt8TileKept = kInt8TileColumns / 2;
constexpr int64_t kInt8TileBytes = kTileRows * (kInt8TileKept + kInt8TileColumns / 8);
constexpr int64_t kDenseInt8TileBytes = kTileRows * kInt8TileColumns;

constexpr int64_t kInt4RowBytes = kInt8TileColumns / 4;  // of a tile's values
constexpr int64_t kInt4PositionsAt = kTileRows * kInt4RowBytes;
constexpr int64_t kInt4ScalesAt = kInt4PositionsAt + kTileRows * kInt8TileColumns / 8;
constexpr int64_t kMostScaleGroups = 4;  // of a tile

enum class DType { kBFloat16, kFloat16, kFloat32 };

enum class Weights { kOfXsDType, kInt8, kInt4, kDenseInt8 };  // the last has no zeros

// What is chosen by measurement (cpu/tuning.py); defaults in ops.cpp.
// Of the weights, for few tokens: into no cache, L1, L2. For many and n of 64, kT0 is L1, else L2.
enum class Prefetch { kNone, kT0, kT1 };

constexpr int64_t kMostFewTokens = 8;
constexpr int64_t kLeastLibraryTokens = 32;

struct Tuning {
  int64_t few_tokens;       // bf16: up to how many the kernel for few runs
  int64_t few_tokens_int8;  // the same for int8 weights
  int64_t few_tokens_int4;  // and for 4-bit weights
  Prefetch prefetch;
  int64_t library_tokens = 0;       // from how many on a library multiplies (library.h); 0: never
  int64_t library_tokens_int8 = 0;  // the same for int8 and 4-bit weights
};

struct Linear {
  const void* x;     // [M, K], dtype; a token's K values are contiguous
  int64_t x_stride;  // elements from one token to the next
  const uint8_t* packed;
  const float* scale = nullptr;  // [N], of int8 weights; else null
  const float* bias;             // [N] or null
  void* out;                     // [M, N], dtype, contiguous
  int64_t num_tokens, out_features, in_features;
  DType dtype;
  Tuning tuning;
  int64_t scale_group = 0;  // columns that share a scale, 128, 64 or 32, of 4-bit weights; else 0
  int64_t kept = 0;         // of 64 columns, in the layout of linear64.h; 0: 2:4

  int64_t tile_rows() const { return kept == 0 ? kTileRows : kTileRows64; }
  int64_t num_tile_rows() const { return (out_features + tile_rows() - 1) / tile_rows(); }
  int64_t num_tile_columns() const { return (in_features + kTileColumns - 1) / kTileColumns; }
  int64_t num_int8_tile_columns() const {
    return (in_features + kInt8TileColumns - 1) / kInt8TileColumns;
  }
  bool has_integers() const { return scale != nullptr || scale_group != 0; }
  bool is_for_few_kernel() const {
    if (!has_integers()) return num_tokens <= tuning.few_tokens;
    return num_tokens <= (scale_group != 0 ? tuning.few_tokens_int4 : tuning.few_tokens_int8);
  }
  int64_t padded_in_features() const {
    return has_integers() ? num_int8_tile_columns() * kInt8TileColumns
                          : num_tile_columns() * kTileColumns;
  }
  int64_t num_scale_groups() const { return kInt8TileColumns / scale_group; }  // of a tile
  int64_t int4_tile_bytes() const { return kInt4ScalesAt + kTileRows * num_scale_groups() * 2; }
};

// One way to compute. `prepare` turns x into the form that `run` reads (workspace is 64-byte
// aligned); `run` computes the tile rows [begin, end) and may be called from several threads at
// once.
struct Product {
  int64_t (*workspace_bytes)(const Linear&);
  void (*prepare)(const Linear&, void* workspace);
  void (*run)(const Linear&, const void* workspace, int64_t begin, int64_t end);
};

// What a library's dense product takes: the tile rows [begin, end) of sparse weights as dense rows,
// [tile_rows() * (end - begin)][padded_in_features()], in fp32 without their scale (of 4-bit
// weights: with it), or in bf16 for bf16 weights; and x for 8-bit and 4-bit weights, quantised and
// times its scales, [M][padded_in_features()].
struct Expansion {
  void (*floats)(const Linear&, int64_t begin, int64_t end, float* rows);
  void (*bf16)(const Linear&, int64_t begin, int64_t end, void* rows);
  void (*rounded_x)(const Linear&, float* to);
};

// An ISA's kernel: the product with each of Weights. has_bf16: whether its CPUs multiply bf16.
struct Kernel {
  const char* isa;
  bool (*is_supported)();
  const Product *linear24, *linear24_int8, *linear24_int4, *linear_int8;
  const Product *linear64, *linear64_int8, *linear64_int4;
  const Expansion* expansion;
  bool has_bf16;
};

extern const Kernel kPortable;
#ifdef __x86_64__
extern const Kernel kAvx2;
extern const Kernel kAvx512;
extern const Kernel kAvx512Vnni;
extern const Kernel kAvx512Bf16;
extern const Kernel kAmx;
extern const Kernel kAmxEmulated;
// Other kernels use these too.
extern const Product kAvx512Linear24, kAvx512Bf16Linear24;
extern const Product kVnniLinear24Int8, kVnniLinear24Int4, kVnniLinearInt8;
extern const Product kAvx512Linear64, kAvx512Bf16Linear64, kVnniLinear64Int8, kVnniLinear64Int4;
extern const Expansion kAvx512Expansion;
#endif

}  // namespace cast
