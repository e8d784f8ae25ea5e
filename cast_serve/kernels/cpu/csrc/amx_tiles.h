// The eight tile registers of AMX: the CPU's, or computed in C++ to test the kernels on any CPU.
//
// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 x. Those of weights have 16 rows of 64 bytes,
// those of x and sums as many rows and bytes as `configure` is told. In a dot product row n of the
// weights meets lane t of x: sums[n][t] += weights[n][i] * x[i / 2][t][i % 2] of bf16, x[i /
// 4][t][i % 4] of int8. TokenRows has weights and x change places.
#pragma once
#include <cstdint>
#include <cstring>

namespace cast {
namespace {

constexpr int kFirstWeightTile = 4, kFirstXTile = 6, kNumTiles = 8;
constexpr int64_t kTileRegisterRows = 16;

#ifdef __AMX_TILE__
// GCC's intrinsics take no template argument as a tile's number, so the instructions are spelt out.
struct AmxTiles {
  static void configure(int64_t x_rows, int64_t x_row_bytes) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < kNumTiles; ++tile) {
      const bool is_weight = tile >= kFirstWeightTile && tile < kFirstXTile;
      config.row_bytes[tile] = static_cast<uint16_t>(is_weight ? 64 : x_row_bytes);
      config.rows[tile] = static_cast<uint8_t>(is_weight ? kTileRegisterRows : x_rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
  }
  template <int kTile>
  static void store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kWeights), "i"(kX));
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kWeights), "i"(kX));
  }
};
#endif

struct EmulatedTiles {
  static inline thread_local uint8_t tiles[kNumTiles][kTileRegisterRows][64];
  static inline thread_local int64_t num_x_rows, x_row_bytes;

  static bool is_weight(int tile) { return tile >= kFirstWeightTile && tile < kFirstXTile; }
  static int64_t num_rows(int tile) { return is_weight(tile) ? kTileRegisterRows : num_x_rows; }
  static int64_t row_bytes(int tile) { return is_weight(tile) ? 64 : x_row_bytes; }
  static void configure(int64_t x_rows, int64_t bytes) {
    num_x_rows = x_rows, x_row_bytes = bytes;
    std::memset(tiles, 0, sizeof(tiles));
  }
  static void release() { num_x_rows = x_row_bytes = 0; }
  template <int kTile>
  static void zero() {
    std::memset(tiles[kTile], 0, sizeof(tiles[kTile]));
  }
  template <int kTile>
  static void load(const void* rows, int64_t stride) {
    for (int64_t i = 0; i < num_rows(kTile); ++i)
      std::memcpy(tiles[kTile][i], static_cast<const uint8_t*>(rows) + i * stride,
                  row_bytes(kTile));
  }
  template <int kTile>
  static void store(void* rows, int64_t stride) {
    for (int64_t i = 0; i < num_rows(kTile); ++i)
      std::memcpy(static_cast<uint8_t*>(rows) + i * stride, tiles[kTile][i], row_bytes(kTile));
  }
  static float bf16_at(const uint8_t* row, int64_t i) {
    uint16_t half;
    std::memcpy(&half, row + i * 2, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_bf16() {
    for (int64_t n = 0; n < num_x_rows; ++n)
      for (int64_t lane = 0; lane < x_row_bytes / 4; ++lane) {
        float sum;
        std::memcpy(&sum, tiles[kSums][n] + lane * 4, 4);
        for (int64_t i = 0; i < 32; ++i)
          sum += bf16_at(tiles[kWeights][n], i) * bf16_at(tiles[kX][i / 2], lane * 2 + i % 2);
        std::memcpy(tiles[kSums][n] + lane * 4, &sum, 4);
      }
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_int8() {
    for (int64_t n = 0; n < num_x_rows; ++n)
      for (int64_t lane = 0; lane < x_row_bytes / 4; ++lane) {
        int32_t sum;
        std::memcpy(&sum, tiles[kSums][n] + lane * 4, 4);
        for (int64_t i = 0; i < 64; ++i)
          sum += static_cast<int8_t>(tiles[kWeights][n][i]) *
                 static_cast<int8_t>(tiles[kX][i / 4][lane * 4 + i % 4]);
        std::memcpy(tiles[kSums][n] + lane * 4, &sum, 4);
      }
  }
};

// Weights that keep n of 64 are expanded to [4 bytes of K][16 rows], as x is above. So x is what
// they are there: a row of x and of sums is a token, and has 64 bytes.
template <typename Tiles>
struct TokenRows : Tiles {
  template <int kTile>
  static void load(const void* rows, int64_t) {
    Tiles::template load<kTile>(rows, 64);
  }
  template <int kTile>
  static void store(void* rows, int64_t) {
    Tiles::template store<kTile>(rows, 64);
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_bf16() {
    Tiles::template add_dot_bf16<kSums, kX, kWeights>();
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_int8() {
    Tiles::template add_dot_int8<kSums, kX, kWeights>();
  }
};

}  // namespace
}  // namespace cast
