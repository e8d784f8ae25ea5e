// The kernel of amx.cpp and amx_emulated.cpp, whichever tiles it is compiled for: 8-bit, 4-bit and
// bf16 weights by AMX from some number of tokens on, fewer tokens as avx512bf16.cpp does, other
// dtypes by avx512.cpp.
#pragma once
#include "amx_linear.h"
#include "linear24.h"

namespace cast {
namespace {

template <typename Tiles>
struct AmxProducts {
  // bf16. The workspace begins with a line that says which kernel x was prepared for: x that is not
  // finite is multiplied by the AVX-512 kernel, whose dropped weights are not multiplied at all.
  static bool is_few(const Linear& p) {
    return p.dtype != DType::kBFloat16 || p.is_for_few_kernel();
  }
  static int64_t bf16_bytes(const Linear& p) {
    const int64_t other = kAvx512Bf16Linear24.workspace_bytes(p);
    return is_few(p) ? other : 64 + std::max(other, amx_x_bytes(p, Weights::kOfXsDType));
  }
  static void prepare_bf16(const Linear& p, void* workspace) {
    if (is_few(p)) return kAvx512Bf16Linear24.prepare(p, workspace);
    uint8_t* x = static_cast<uint8_t*>(workspace) + 64;
    const bool is_finite = prepare_amx_bf16(p, x);
    *static_cast<bool*>(workspace) = is_finite;
    if (!is_finite) kAvx512Bf16Linear24.prepare(p, x);
  }
  static void run_bf16(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
    if (is_few(p)) return kAvx512Bf16Linear24.run(p, workspace, begin, end);
    const uint8_t* x = static_cast<const uint8_t*>(workspace) + 64;
    if (!*static_cast<const bool*>(workspace)) return kAvx512Bf16Linear24.run(p, x, begin, end);
    run_amx<Tiles, Weights::kOfXsDType>(p, x, begin, end);
  }

  template <Weights kWeights>
  static const Product& few_int8() {
    if (kWeights == Weights::kInt8) return kVnniLinear24Int8;
    return kWeights == Weights::kInt4 ? kVnniLinear24Int4 : kVnniLinearInt8;
  }
  template <Weights kWeights>
  static int64_t int8_bytes(const Linear& p) {
    return p.is_for_few_kernel() ? few_int8<kWeights>().workspace_bytes(p) : amx_int8_bytes(p);
  }
  template <Weights kWeights>
  static void prepare_int8(const Linear& p, void* workspace) {
    if (p.is_for_few_kernel()) return few_int8<kWeights>().prepare(p, workspace);
    prepare_amx_int8(p, workspace);
  }
  template <Weights kWeights>
  static void run_int8(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
    if (p.is_for_few_kernel()) return few_int8<kWeights>().run(p, workspace, begin, end);
    if constexpr (kWeights == Weights::kInt4) {
      if (p.scale_group == 64) return run_amx<Tiles, kWeights, 2>(p, workspace, begin, end);
      if (p.scale_group == 32) return run_amx<Tiles, kWeights, 4>(p, workspace, begin, end);
    }
    run_amx<Tiles, kWeights>(p, workspace, begin, end);
  }
  template <Weights kWeights>
  static constexpr Product kInt8 = {int8_bytes<kWeights>, prepare_int8<kWeights>,
                                    run_int8<kWeights>};
  static constexpr Product kLinear24 = {bf16_bytes, prepare_bf16, run_bf16};
  static constexpr Product kLinear24Int8 = kInt8<Weights::kInt8>;
  static constexpr Product kLinear24Int4 = kInt8<Weights::kInt4>;
  static constexpr Product kLinearInt8 = kInt8<Weights::kDenseInt8>;
};

}  // namespace
}  // namespace cast
