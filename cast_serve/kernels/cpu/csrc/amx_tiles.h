// The eight tile registers of AMX: the CPU's, or computed in C++ to test the kernels on any CPU.
//
// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 x; all have 16 rows. A row of weights has 64
// bytes, a row of x or sums `lanes` times 4. In a dot product row n of the weights meets lane t of
// x: sums[n][t] += weights[n][i] * x[i / 2][t][i % 2] of bf16, x[i / 4][t][i % 4] of int8.
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
  static void configure(int64_t lanes) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < kNumTiles; ++tile) {
      const bool is_weight = tile >= kFirstWeightTile && tile < kFirstXTile;
      config.row_bytes[tile] = static_cast<uint16_t>(is_weight ? 64 : lanes * 4);
      config.rows[tile] = kTileRegisterRows;
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
  static inline thread_local int64_t num_lanes;

  static int64_t row_bytes(int tile) {
    return tile >= kFirstWeightTile && tile < kFirstXTile ? 64 : num_lanes * 4;
  }
  static void configure(int64_t lanes) {
    num_lanes = lanes;
    std::memset(tiles, 0, sizeof(tiles));
  }
  static void release() { num_lanes = 0; }
  template <int kTile>
  static void zero() {
    std::memset(tiles[kTile], 0, sizeof(tiles[kTile]));
  }
  template <int kTile>
  static void load(const void* rows, int64_t stride) {
    for (int64_t i = 0; i < kTileRegisterRows; ++i)
      std::memcpy(tiles[kTile][i], static_cast<const uint8_t*>(rows) + i * stride,
                  row_bytes(kTile));
  }
  template <int kTile>
  static void store(void* rows, int64_t stride) {
    for (int64_t i = 0; i < kTileRegisterRows; ++i)
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
    for (int64_t n = 0; n < kTileRegisterRows; ++n)
      for (int64_t lane = 0; lane < num_lanes; ++lane) {
        float sum;
        std::memcpy(&sum, tiles[kSums][n] + lane * 4, 4);
        for (int64_t i = 0; i < 32; ++i)
          sum += bf16_at(tiles[kWeights][n], i) * bf16_at(tiles[kX][i / 2], lane * 2 + i % 2);
        std::memcpy(tiles[kSums][n] + lane * 4, &sum, 4);
      }
  }
  template <int kSums, int kWeights, int kX>
  static void add_dot_int8() {
    for (int64_t n = 0; n < kTileRegisterRows; ++n)
      for (int64_t lane = 0; lane < num_lanes; ++lane) {
        int32_t sum;
        std::memcpy(&sum, tiles[kSums][n] + lane * 4, 4);
        for (int64_t i = 0; i < 64; ++i)
          sum += static_cast<int8_t>(tiles[kWeights][n][i]) *
                 static_cast<int8_t>(tiles[kX][i / 4][lane * 4 + i % 4]);
        std::memcpy(tiles[kSums][n] + lane * 4, &sum, 4);
      }
  }
};

}  // namespace
}  // namespace cast
