// Products on stdin -> their outputs on stdout, by the portable kernel: test_aarch64.py builds it
// for another CPU and runs it under emulation. No torch in here.
//
// A product: a Header, then x [M, K], packed, scale fp32 [N] (of 8-bit weights), bias fp32 [N]. Its
// output is [M, N] in x's dtype.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "linear24.h"

namespace {

struct Header {
  int64_t weights;      // as cast::Weights
  int64_t scale_group;  // of 4-bit weights, else 0
  int64_t kept;         // of 64 columns; 0: 2:4
  int64_t dtype;        // as cast::DType
  int64_t num_tokens, out_features, in_features, packed_bytes;
};

struct Buffer {  // aligned as the packed weight and the workspace must be
  explicit Buffer(size_t bytes) : data(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  void* data;
};

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) == bytes) return;
  std::fprintf(stderr, "the product on stdin ends too early\n");
  std::exit(1);
}

void compute(const Header& header) {
  const int64_t m = header.num_tokens, n = header.out_features, k = header.in_features;
  const auto dtype = static_cast<cast::DType>(header.dtype);
  const size_t size = dtype == cast::DType::kFloat32 ? 4 : 2;
  Buffer x(m * k * size), packed(header.packed_bytes), out(m * n * size);
  std::vector<float> scale(n), bias(n);
  read(x.data, m * k * size);
  read(packed.data, header.packed_bytes);
  const auto weights = static_cast<cast::Weights>(header.weights);
  const bool has_scale = weights == cast::Weights::kInt8 || weights == cast::Weights::kDenseInt8;
  if (has_scale) read(scale.data(), n * sizeof(float));
  read(bias.data(), n * sizeof(float));

  cast::Linear p;
  p.x = x.data, p.x_stride = k, p.packed = static_cast<const uint8_t*>(packed.data);
  p.scale = has_scale ? scale.data() : nullptr, p.bias = bias.data(), p.out = out.data;
  p.num_tokens = m, p.out_features = n, p.in_features = k, p.dtype = dtype;
  p.scale_group = header.scale_group, p.kept = header.kept;
  p.tuning = {0, 0, 0, cast::Prefetch::kNone};

  const cast::Product* products[] = {cast::kPortable.linear24, cast::kPortable.linear24_int8,
                                     cast::kPortable.linear24_int4, cast::kPortable.linear_int8};
  const cast::Product* products64[] = {cast::kPortable.linear64, cast::kPortable.linear64_int8,
                                       cast::kPortable.linear64_int4};
  const cast::Product& product =
      header.kept != 0 ? *products64[header.weights] : *products[header.weights];
  Buffer workspace(product.workspace_bytes(p));
  product.prepare(p, workspace.data);
  product.run(p, workspace.data, 0, p.num_tile_rows());
  std::fwrite(out.data, size, m * n, stdout);
}

}  // namespace

int main() {
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) compute(header);
}
