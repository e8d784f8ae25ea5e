// Weights that keep n of each 64 columns of a row, whichever n: their packed layout.
//
// A tile is 16 out_features x 64 in_features, or x 128 of 8-bit and 4-bit weights. It is cut into
// steps of as many columns as have 4 bytes in a dense weight: 4 of 8 and of 4 bits, 2 of 16, 1 of
// 32. So a step's dense weights are 64 bytes, a register: row after row, in a row column by column.
//
//     values  the kept weights, step after step in that order; 8 bits plus 128, 4 bits plus 8
//     masks   a bit for each weight in that order, 1 = kept: 128 bytes, or 256 for 128 columns;
//             none where all 64 are kept
//     scales  of 4-bit weights: a bf16 number for each scale group and row, [scale group][16]
//
// Byte j of 4-bit values has the j-th kept weight of the tile's first 64 columns in its lower half,
// and of the second 64 columns in its upper half. 64 columns of a tile keep 16 n weights, so all
// tiles have the same size; where in it a step's values begin is the number of bits before it.
// N and K are padded to whole tiles with zero values in the first n of 64 columns.
//
// One instruction (vpexpandb, vpexpandw) turns values and a mask into the register, which is then
// multiplied as a dense product's: rows in lanes, each token's columns broadcast.
#pragma once
#include <array>

#include "linear24.h"

namespace cast {

inline int64_t tile_columns64(const Linear& p) {
  return p.has_integers() ? kInt8TileColumns : kTileColumns;
}
inline int64_t num_tiles64(const Linear& p) {  // of a tile row
  return p.padded_in_features() / tile_columns64(p);
}
inline int64_t values_bytes64(const Linear& p) {  // of a tile
  if (p.scale_group != 0) return kTileRows64 * p.kept;
  if (p.scale != nullptr) return kTileRows64 * p.kept * 2;
  return kTileRows64 * p.kept * (p.dtype == DType::kFloat32 ? 4 : 2);
}
inline bool has_masks64(const Linear& p) { return p.kept < kTileColumns; }
inline int64_t scales_at64(const Linear& p) {
  return values_bytes64(p) + (has_masks64(p) ? kTileRows64 * tile_columns64(p) / 8 : 0);
}
inline int64_t tile_bytes64(const Linear& p) {
  return scales_at64(p) + (p.scale_group != 0 ? p.num_scale_groups() * kTileRows64 * 2 : 0);
}

constexpr auto kAllKept = [] {
  std::array<uint8_t, kTileRows64 * kInt8TileColumns / 8> masks = {};
  masks.fill(0xFF);
  return masks;
}();
inline const uint8_t* masks64(const Linear& p, const uint8_t* tile) {
  return has_masks64(p) ? tile + values_bytes64(p) : kAllKept.data();
}

// Where x of 16-bit and 32-bit weights is Inf or NaN, a product takes 0 for it: what a row drops
// must not be multiplied. This adds x times the kept weights there to the outputs of the tile rows
// [begin, end), which become Inf or NaN. Defined in portable.cpp.
void add_not_finite64(const Linear& p, int64_t begin, int64_t end);

}  // namespace cast
