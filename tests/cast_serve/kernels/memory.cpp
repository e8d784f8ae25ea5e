// Every kernel of this CPU on heap buffers of exactly the size it may touch, for AddressSanitizer
// (scripts/check-kernel-memory builds and runs it). Outputs start as a sentinel and are compared
// with a plain product; a wrong one ends with exit code 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "linear24.h"

namespace {

using cast::DType;
using cast::kTileColumns;
using cast::kTileKept;
using cast::kTileRows;
using cast::Linear24;

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

bool check(const cast::Kernel& kernel, DType dtype, int64_t m, int64_t n, int64_t k) {
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t tile_bytes = kTileRows * (kTileKept * size + 8);
  Linear24 p;
  p.num_tokens = m, p.out_features = n, p.in_features = k, p.dtype = dtype;
  p.scale = nullptr, p.tuning = {8, 8, cast::Prefetch::kT0};
  p.x_stride = k + 3;
  // malloc, not Buffer: the last token's row ends where the buffer ends.
  void* x = std::malloc(((m - 1) * p.x_stride + k) * size);
  void* out = std::malloc(m * n * size);
  float* bias = static_cast<float*>(std::malloc(n * sizeof(float)));
  Buffer packed(p.num_tile_rows() * p.num_tile_columns() * tile_bytes);
  std::normal_distribution<float> normal;
  for (int64_t token = 0; token < m; ++token)
    for (int64_t i = 0; i < k; ++i) store(x, token * p.x_stride + i, dtype, normal(random_bits));
  for (int64_t i = 0; i < n; ++i) bias[i] = normal(random_bits);
  for (int64_t i = 0; i < m * n; ++i) store(out, i, dtype, 12345.0f);

  std::vector<double> dense(n * k);
  const uint8_t codes[] = {4, 8, 9, 12, 13, 14};
  for (int64_t row = 0; row < p.num_tile_rows() * kTileRows; ++row)
    for (int64_t group = 0; group < p.num_tile_columns() * kTileColumns / 4; ++group) {
      const int64_t in_tile = group % (kTileColumns / 4);
      uint8_t* tile =
          static_cast<uint8_t*>(packed.data) +
          (row / kTileRows * p.num_tile_columns() + group / (kTileColumns / 4)) * tile_bytes;
      uint8_t* positions = tile + kTileRows * kTileKept * size + row % kTileRows * 8 + in_tile / 2;
      const bool is_inside = row < n && group * 4 < k;
      const uint8_t code = is_inside ? codes[random_bits() % 6] : 4;
      *positions = in_tile % 2 ? *positions | code << 4 : code;
      for (int i = 0; i < 2; ++i) {
        const int64_t at = row % kTileRows * kTileKept + in_tile * 2 + i;
        store(tile, at, dtype, is_inside ? normal(random_bits) : 0.0f);
        if (is_inside) dense[row * k + group * 4 + (code >> 2 * i & 3)] = load(tile, at, dtype);
      }
    }
  p.x = x, p.out = out, p.bias = bias, p.packed = static_cast<const uint8_t*>(packed.data);
  Buffer workspace(kernel.linear24->workspace_bytes(p));
  kernel.linear24->prepare(p, workspace.data);
  const int64_t middle = p.num_tile_rows() / 2;  // as two threads would
  kernel.linear24->run(p, workspace.data, 0, middle);
  kernel.linear24->run(p, workspace.data, middle, p.num_tile_rows());

  double error = 0, norm = 0;
  for (int64_t token = 0; token < m; ++token)
    for (int64_t row = 0; row < n; ++row) {
      double sum = bias[row];
      for (int64_t i = 0; i < k; ++i)
        sum += load(x, token * p.x_stride + i, dtype) * dense[row * k + i];
      const double difference = load(out, token * n + row, dtype) - sum;
      error += difference * difference, norm += sum * sum;
    }
  std::free(x), std::free(out), std::free(bias);
  const bool is_right = std::sqrt(error / norm) < 5e-3;
  if (!is_right)
    std::printf("%s m=%ld n=%ld k=%ld: relative error %g\n", kernel.isa, long(m), long(n), long(k),
                std::sqrt(error / norm));
  return is_right;
}

}  // namespace

int main() {
  const cast::Kernel* kernels[] = {
#ifdef __x86_64__
      &cast::kAvx512Bf16, &cast::kAvx512Vnni, &cast::kAvx512, &cast::kAvx2,
#endif
      &cast::kPortable};
  const int64_t shapes[][2] = {{1, 4}, {7, 60}, {8, 64}, {33, 260}, {129, 68}, {1049, 132}};
  int num_checked = 0;
  bool is_right = true;
  for (const cast::Kernel* kernel : kernels) {
    if (!kernel->is_supported()) {
      std::printf("%s: not on this CPU\n", kernel->isa);
      continue;
    }
    for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
      for (const auto& [n, k] : shapes)
        for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33, 41, 64, 130, 257}) {
          is_right &= check(*kernel, dtype, m, n, k);
          ++num_checked;
        }
    std::printf("%s: checked\n", kernel->isa);
  }
  std::printf("%d products, %s\n", num_checked, is_right ? "all right" : "SOME WRONG");
  return is_right ? 0 : 1;
}
