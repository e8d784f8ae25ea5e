// Every kernel of this CPU on heap buffers of exactly the size it may touch, for AddressSanitizer
// (scripts/check-kernel-memory builds and runs it). Outputs start as a sentinel and are compared
// with a plain product; a wrong one ends with exit code 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "linear64.h"

namespace {

using cast::DType;
using cast::kTileColumns;
using cast::kTileRows;
using cast::Linear;
using cast::Weights;

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

double load(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kBFloat16) return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
  if (dtype == DType::kFloat16) return static_cast<float>(static_cast<const _Float16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

void store(void* data, int64_t i, DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kBFloat16) static_cast<uint16_t*>(data)[i] = bits >> 16;
  if (dtype == DType::kFloat16) static_cast<_Float16*>(data)[i] = static_cast<_Float16>(value);
  if (dtype == DType::kFloat32) static_cast<float*>(data)[i] = value;
}

struct Buffer {
  explicit Buffer(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  void* data;
};

std::mt19937 random_bits(0);

// What a kind of weight changes in the layout.
struct Format {
  Weights weights;
  int64_t element_bytes;  // of bf16, fp16 or fp32 weights
  int64_t scale_group;    // of 4-bit weights, else 0
  bool has_integers() const { return weights != Weights::kOfXsDType; }
  bool is_int4() const { return weights == Weights::kInt4; }
  bool is_dense() const { return weights == Weights::kDenseInt8; }
  int64_t tile_columns() const { return has_integers() ? cast::kInt8TileColumns : kTileColumns; }
  int64_t group_kept() const { return is_dense() ? 4 : 2; }
  int64_t row_bytes() const {
    const int64_t kept = tile_columns() / 4 * group_kept();
    return is_int4() ? kept / 2 : has_integers() ? kept : kept * element_bytes;
  }
  int64_t positions_bytes() const { return is_dense() ? 0 : tile_columns() / 8; }  // of a row
  int64_t scales_bytes() const { return is_int4() ? tile_columns() / scale_group * 2 : 0; }
  int64_t tile_bytes() const {
    return kTileRows * (row_bytes() + positions_bytes() + scales_bytes());
  }
};

// A 4-bit weight, -8 to 7, to its place in a row of a tile.
void store_int4(uint8_t* row, int64_t kept, int value) {
  const int64_t a = kept / 16, b = kept / 8 % 2, c = kept / 4 % 2, d = kept % 4;
  uint8_t& both = row[16 * c + 4 * a + d];
  both = static_cast<uint8_t>(b ? (both & 15) | value << 4 : (both & 0xF0) | (value & 15));
}

// The product's x: for int8 weights what quantising leaves of it, scale group by scale group.
std::vector<double> seen_x(const Linear& p, const Format& format) {
  std::vector<double> seen(p.num_tokens * p.in_features);
  for (int64_t token = 0; token < p.num_tokens; ++token)
    for (int64_t first = 0; first < p.in_features; first += cast::kInt8TileColumns) {
      const int64_t end = std::min(first + cast::kInt8TileColumns, p.in_features);
      float largest = 0;
      for (int64_t i = first; i < end; ++i)
        largest = std::fmax(largest, std::fabs(load(p.x, token * p.x_stride + i, p.dtype)));
      const float scale = largest / 127;
      for (int64_t i = first; i < end; ++i) {
        const float x = load(p.x, token * p.x_stride + i, p.dtype);
        seen[token * p.in_features + i] =
            format.has_integers() ? double(std::nearbyint(x / scale)) * scale : x;
      }
    }
  return seen;
}

// Fills the packed weight at random and returns it densely.
std::vector<double> fill(const Linear& p, const Format& format, uint8_t* packed) {
  std::vector<double> dense(p.out_features * p.in_features);
  std::normal_distribution<float> normal;
  const uint8_t codes[] = {4, 8, 9, 12, 13, 14};
  const int64_t row_tiles = (p.in_features + format.tile_columns() - 1) / format.tile_columns();
  const int64_t tile_groups = format.tile_columns() / 4;
  for (int64_t row = 0; row < p.num_tile_rows() * kTileRows; ++row)
    for (int64_t group = 0; group < row_tiles * tile_groups; ++group) {
      const int64_t in_tile = group % tile_groups, in_rows = row % kTileRows;
      uint8_t* tile =
          packed + (row / kTileRows * row_tiles + group / tile_groups) * format.tile_bytes();
      const bool is_inside = row < p.out_features && group * 4 < p.in_features;
      const uint8_t code = is_inside ? codes[random_bits() % 6] : 4;
      double int4_scale = 0;
      if (format.is_int4()) {
        const int64_t groups = format.tile_columns() / format.scale_group;
        const int64_t number = in_rows * groups + in_tile * 4 / format.scale_group;
        uint8_t* scales = tile + kTileRows * (format.row_bytes() + format.positions_bytes());
        store(scales, number, DType::kBFloat16, 1.0f / (1 + row % 7 + number));
        int4_scale = load(scales, number, DType::kBFloat16);
      }
      if (!format.is_dense()) {
        uint8_t* positions = tile + kTileRows * format.row_bytes() +
                             in_rows * format.positions_bytes() + in_tile / 2;
        *positions = in_tile % 2 ? *positions | code << 4 : code;
      }
      for (int i = 0; i < format.group_kept(); ++i) {
        uint8_t* of_row = tile + in_rows * format.row_bytes();
        const int64_t kept = in_tile * format.group_kept() + i;
        const int column = format.is_dense() ? i : code >> 2 * i & 3;
        double value = 0;
        if (format.is_int4()) {
          const int integer = is_inside ? static_cast<int>(random_bits() % 16) - 8 : 0;
          store_int4(of_row, kept, integer);
          value = integer * int4_scale;
        } else if (format.has_integers()) {
          of_row[kept] = is_inside ? static_cast<int>(random_bits() % 255) - 127 : 0;
          value = static_cast<int8_t>(of_row[kept]) *
                  double(p.scale[std::min(row, p.out_features - 1)]);
        } else {
          store(of_row, kept, p.dtype, is_inside ? normal(random_bits) : 0.0f);
          value = load(of_row, kept, p.dtype);
        }
        if (is_inside) dense[row * p.in_features + group * 4 + column] = value;
      }
    }
  return dense;
}

// The weight and x as a library's dense product takes them; dense and seen as in `check`.
bool is_expansion_right(const cast::Kernel& kernel, const Linear& p,
                        const std::vector<double>& dense, const std::vector<double>& seen) {
  const int64_t columns = p.padded_in_features(), num_rows = p.num_tile_rows() * p.tile_rows();
  Buffer rows(num_rows * columns * sizeof(float)), bf16_rows(num_rows * columns * 2);
  Buffer x(p.num_tokens * columns * sizeof(float));
  const bool has_integers = p.has_integers();
  const bool is_bf16 = !has_integers && p.dtype == DType::kBFloat16;
  kernel.expansion->floats(p, 0, p.num_tile_rows(), static_cast<float*>(rows.data));
  if (is_bf16) kernel.expansion->bf16(p, 0, p.num_tile_rows(), bf16_rows.data);
  if (has_integers) kernel.expansion->rounded_x(p, static_cast<float*>(x.data));

  bool is_right = true;
  const auto compare = [&](double value, double expected) {
    is_right &= std::fabs(value - expected) <= 1e-6 * std::fabs(expected);
  };
  for (int64_t row = 0; row < p.out_features; ++row)
    for (int64_t i = 0; i < p.in_features; ++i) {
      const double scale = p.scale ? p.scale[row] : 1.0, expected = dense[row * p.in_features + i];
      compare(load(rows.data, row * columns + i, DType::kFloat32) * scale, expected);
      if (is_bf16) compare(load(bf16_rows.data, row * columns + i, p.dtype), expected);
    }
  for (int64_t token = 0; has_integers && token < p.num_tokens; ++token)
    for (int64_t i = 0; i < p.in_features; ++i)
      compare(load(x.data, token * columns + i, DType::kFloat32), seen[token * p.in_features + i]);
  return is_right;
}

const cast::Product& product_of(const cast::Kernel& kernel, Weights weights, int64_t kept) {
  if (kept != 0 && weights != Weights::kDenseInt8)
    return weights == Weights::kInt8   ? *kernel.linear64_int8
           : weights == Weights::kInt4 ? *kernel.linear64_int4
                                       : *kernel.linear64;
  switch (weights) {
    case Weights::kInt8:
      return *kernel.linear24_int8;
    case Weights::kInt4:
      return *kernel.linear24_int4;
    case Weights::kDenseInt8:
      return *kernel.linear_int8;
    default:
      return *kernel.linear24;
  }
}

std::vector<double> fill64(const Linear& p, uint8_t* packed);

// kept: of 64 columns; 0: 2:4.
bool check(const cast::Kernel& kernel, Weights weights, int64_t scale_group, DType dtype,
           const cast::Tuning& tuning, int64_t m, int64_t n, int64_t k, int64_t kept = 0) {
  const cast::Product& product = product_of(kernel, weights, kept);
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  const Format format = {weights, static_cast<int64_t>(size), scale_group};
  Linear p;
  p.num_tokens = m, p.out_features = n, p.in_features = k, p.dtype = dtype, p.tuning = tuning;
  p.x_stride = k + 3, p.scale_group = scale_group, p.kept = kept;
  // malloc, not Buffer: the last token's row ends where the buffer ends.
  void* x = std::malloc(((m - 1) * p.x_stride + k) * size);
  void* out = std::malloc(m * n * size);
  float* bias = static_cast<float*>(std::malloc(n * sizeof(float)));
  float* scale = static_cast<float*>(std::malloc(n * sizeof(float)));
  p.scale = format.has_integers() && !scale_group ? scale : nullptr;
  const int64_t row_tiles = (k + format.tile_columns() - 1) / format.tile_columns();
  const int64_t tile_bytes = kept != 0 ? cast::tile_bytes64(p) : format.tile_bytes();
  Buffer packed(p.num_tile_rows() * row_tiles * tile_bytes);
  std::normal_distribution<float> normal;
  for (int64_t token = 0; token < m; ++token)
    for (int64_t i = 0; i < k; ++i) store(x, token * p.x_stride + i, dtype, normal(random_bits));
  for (int64_t i = 0; i < n; ++i) bias[i] = normal(random_bits), scale[i] = 1.0f / (1 + i % 7);
  for (int64_t i = 0; i < m * n; ++i) store(out, i, dtype, 12345.0f);
  p.x = x, p.out = out, p.bias = bias;
  p.packed = static_cast<const uint8_t*>(packed.data);
  uint8_t* bytes = static_cast<uint8_t*>(packed.data);
  const std::vector<double> dense = kept != 0 ? fill64(p, bytes) : fill(p, format, bytes);

  Buffer workspace(product.workspace_bytes(p));
  product.prepare(p, workspace.data);
  const int64_t middle = p.num_tile_rows() / 2;  // as two threads would
  product.run(p, workspace.data, 0, middle);
  product.run(p, workspace.data, middle, p.num_tile_rows());

  const std::vector<double> seen = seen_x(p, format);
  double error = 0, norm = 0;
  for (int64_t token = 0; token < m; ++token)
    for (int64_t row = 0; row < n; ++row) {
      double sum = bias[row];
      for (int64_t i = 0; i < k; ++i) sum += seen[token * k + i] * dense[row * k + i];
      const double difference = load(out, token * n + row, dtype) - sum;
      error += difference * difference, norm += sum * sum;
    }
  const bool is_expanded =
      format.is_dense() || m != 33 || is_expansion_right(kernel, p, dense, seen);
  std::free(x), std::free(out), std::free(bias), std::free(scale);
  const bool is_right = is_expanded && std::sqrt(error / norm) < 5e-3;
  if (!is_right)
    std::printf(
        "%s, weights %d, m=%ld n=%ld k=%ld group=%ld kept=%ld: relative error %g, expansion %s\n",
        kernel.isa, static_cast<int>(weights), long(m), long(n), long(k), long(scale_group),
        long(kept), std::sqrt(error / norm), is_expanded ? "right" : "wrong");
  return is_right;
}

// A random weight that keeps p.kept of 64, packed; returns it densely.
std::vector<double> fill64(const Linear& p, uint8_t* packed) {
  std::vector<double> dense(p.out_features * p.in_features);
  std::normal_distribution<float> normal;
  const int64_t columns = cast::tile_columns64(p), num_tiles = cast::num_tiles64(p);
  const int64_t step =
      p.has_integers() || p.dtype == DType::kFloat32 ? (p.has_integers() ? 4 : 1) : 2;
  for (int64_t row_tile = 0; row_tile < p.num_tile_rows(); ++row_tile)
    for (int64_t i = 0; i < num_tiles; ++i) {
      uint8_t* tile = packed + (row_tile * num_tiles + i) * cast::tile_bytes64(p);
      uint8_t *masks = tile + cast::values_bytes64(p), *scales = tile + cast::scales_at64(p);
      std::memset(tile, 0, cast::tile_bytes64(p));
      bool is_kept[cast::kTileRows64][cast::kInt8TileColumns] = {};
      for (auto& row : is_kept)
        for (int64_t word = 0; word < columns; word += 64) {
          std::fill_n(row + word, p.kept, true);
          std::shuffle(row + word, row + word + 64, random_bits);
        }
      const int64_t groups = p.scale_group ? p.num_scale_groups() : 0;
      for (int64_t j = 0; j < groups * cast::kTileRows64; ++j)
        store(scales, j, DType::kBFloat16, 1.0f / (1 + j % 7));
      int64_t bit = 0, next = 0;
      for (int64_t first = 0; first < columns; first += step) {
        if (p.scale_group && first == 64) next = 0;
        for (int64_t row = 0; row < cast::kTileRows64; ++row)
          for (int64_t column = first; column < first + step; ++column, ++bit) {
            if (!is_kept[row][column]) continue;
            masks[bit / 8] |= 1 << bit % 8;
            const int64_t n = row_tile * cast::kTileRows64 + row, k = i * columns + column;
            const bool is_inside = n < p.out_features && k < p.in_features;
            double value;
            if (p.scale_group) {
              const int integer = is_inside ? static_cast<int>(random_bits() % 16) : 8;
              tile[next++] |= column < 64 ? integer : integer << 4;
              const int64_t number = column / p.scale_group * cast::kTileRows64 + row;
              value = (integer - 8) * load(scales, number, DType::kBFloat16);
            } else if (p.has_integers()) {
              const int integer = is_inside ? 1 + static_cast<int>(random_bits() % 255) : 128;
              tile[next++] = static_cast<uint8_t>(integer);
              value = is_inside ? (integer - 128) * double(p.scale[n]) : 0;
            } else {
              store(tile, next, p.dtype, is_inside ? normal(random_bits) : 0.0f);
              value = load(tile, next++, p.dtype);
            }
            if (is_inside) dense[n * p.in_features + k] = value;
          }
      }
    }
  return dense;
}

}  // namespace

int main() {
  const cast::Kernel* kernels[] = {
#ifdef __x86_64__
      &cast::kAmx,        &cast::kAmxEmulated, &cast::kAvx512Bf16,
      &cast::kAvx512Vnni, &cast::kAvx512,      &cast::kAvx2,
#endif
      &cast::kPortable};
  const int64_t shapes[][2] = {{1, 4}, {7, 60}, {8, 64}, {33, 260}, {129, 68}, {1049, 132}};
  const int64_t shapes64[][3] = {{1, 64, 1}, {16, 128, 63}, {33, 320, 40}, {129, 192, 28}};
  const cast::Tuning tunings[] = {{8, 8, 8, cast::Prefetch::kT1}, {0, 0, 0, cast::Prefetch::kNone}};
  const std::pair<Weights, int64_t> kinds[] = {{Weights::kOfXsDType, 0}, {Weights::kInt8, 0},
                                               {Weights::kInt4, 128},    {Weights::kInt4, 64},
                                               {Weights::kInt4, 32},     {Weights::kDenseInt8, 0}};
  int num_checked = 0;
  bool is_right = true;
  for (const cast::Kernel* kernel : kernels) {
    if (!kernel->is_supported()) {
      std::printf("%s: not on this CPU\n", kernel->isa);
      continue;
    }
    for (const auto& [weights, scale_group] : kinds)
      for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
        for (const auto& [n, k] : shapes)
          for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33, 41, 64, 130, 257})
            for (const cast::Tuning& tuning : tunings) {
              if (m > cast::kMostFewTokens && tuning.few_tokens == 0) continue;  // as the first
              is_right &= check(*kernel, weights, scale_group, dtype, tuning, m, n, k);
              ++num_checked;
            }
    for (const auto& [weights, scale_group] : kinds)
      for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
        for (const auto& [n, k, kept] : shapes64)
          for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64, 130, 257})
            for (const cast::Tuning& tuning : tunings) {
              if (weights == Weights::kDenseInt8) continue;
              if (m > cast::kMostFewTokens && tuning.few_tokens == 0) continue;  // as the first
              is_right &= check(*kernel, weights, scale_group, dtype, tuning, m, n, k, kept);
              ++num_checked;
            }
    std::printf("%s: checked\n", kernel->isa);
  }
  std::printf("%d products, %s\n", num_checked, is_right ? "all right" : "SOME WRONG");
  return is_right ? 0 : 1;
}
