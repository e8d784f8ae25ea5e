// The 2:4 linear for any CPU: generic.h at the compiler's baseline.
#define CAST_ISA portable
#define CAST_LANES 4
#include <vector>

#include "expansion.h"
#include "generic.h"
#include "generic_int8.h"

namespace cast {
namespace {

template <typename T>
void add_not_finite(const Linear& p, int64_t begin, int64_t end) {
  constexpr int64_t step = 4 / sizeof(T);  // columns
  std::vector<int64_t> columns;
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    columns.clear();
    for (int64_t k = 0; k < p.in_features; ++k)
      if (!portable::is_finite(portable::to_float(x[k]))) columns.push_back(k);
    for (int64_t tile_row = begin; tile_row < end && !columns.empty(); ++tile_row) {
      const int64_t n = tile_row * kTileRows64, rows = std::min(p.out_features - n, kTileRows64);
      T* out = static_cast<T*>(p.out) + token * p.out_features + n;
      bool is_nan = false;  // all rows; no column changes that any more
      for (size_t i = 0; i < columns.size() && !is_nan; ++i) {
        const int64_t k = columns[i], tile_number = tile_row * num_tiles64(p) + k / kTileColumns;
        const uint8_t* tile = p.packed + tile_number * tile_bytes64(p);
        const uint8_t* masks = tile + values_bytes64(p);
        is_nan = true;
        for (int64_t row = 0; row < rows; ++row) {
          const float sum = portable::to_float(out[row]);
          const int64_t bit = (k % kTileColumns / step * kTileRows64 + row) * step + k % step;
          if (sum == sum && masks[bit / 8] >> bit % 8 & 1) {
            int64_t before = __builtin_popcount(masks[bit / 8] & ((1 << bit % 8) - 1));
            for (int64_t j = 0; j < bit / 8; ++j) before += __builtin_popcount(masks[j]);
            const T weight = reinterpret_cast<const T*>(tile)[before];
            portable::from_float(sum + portable::to_float(weight) * portable::to_float(x[k]),
                                 out + row);
          }
          const float now = portable::to_float(out[row]);
          is_nan &= now != now;
        }
      }
    }
  }
}

}  // namespace

void add_not_finite64(const Linear& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return add_not_finite<portable::BFloat16>(p, begin, end);
    case DType::kFloat16:
      return add_not_finite<_Float16>(p, begin, end);
    case DType::kFloat32:
      return add_not_finite<float>(p, begin, end);
  }
}

static bool is_supported() { return true; }
const Kernel kPortable = {"portable",
                          is_supported,
                          &portable::kLinear24,
                          &portable::kLinear24Int8,
                          &portable::kLinear24Int4,
                          &portable::kLinearInt8,
                          &portable::kLinear64,
                          &portable::kLinear64,
                          &portable::kLinear64,
                          &portable::kExpansion,
                          false};
}  // namespace cast
