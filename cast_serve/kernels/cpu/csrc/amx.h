// The kernel of amx.cpp and amx_emulated.cpp, whichever tiles it is compiled for: 8-bit, 4-bit and
// bf16 weights by AMX from some number of tokens on, fewer tokens as avx512bf16.cpp does, other
// dtypes by avx512.cpp.
#pragma once
#include "amx_linear.h"
#include "linear64.h"

namespace cast {
namespace {

template <typename Tiles>
struct AmxProducts {
  static const Product& bf16_by_avx512(const Linear& p) {
    return p.kept == 0 ? kAvx512Bf16Linear24 : kAvx512Bf16Linear64;
  }

  // bf16. The workspace begins with a line that says whether x is finite. If it is not, 2:4 weights
  // are multiplied by the AVX-512 kernel, whose dropped weights are not multiplied at all; those
  // that keep n of 64 as linear64.h says.
  static bool is_few(const Linear& p) {
    return p.dtype != DType::kBFloat16 || p.is_for_few_kernel();
  }
  static int64_t bf16_bytes(const Linear& p) {
    const int64_t other = bf16_by_avx512(p).workspace_bytes(p);
    return is_few(p) ? other : 64 + std::max(other, amx_x_bytes(p, Weights::kOfXsDType));
  }
  static void prepare_bf16(const Linear& p, void* workspace) {
    if (is_few(p)) return bf16_by_avx512(p).prepare(p, workspace);
    uint8_t* x = static_cast<uint8_t*>(workspace) + 64;
    const bool is_finite = prepare_amx_bf16(p, x);
    *static_cast<bool*>(workspace) = is_finite;
    if (!is_finite && p.kept == 0) kAvx512Bf16Linear24.prepare(p, x);
  }
  static void run_bf16(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
    if (is_few(p)) return bf16_by_avx512(p).run(p, workspace, begin, end);
    const uint8_t* x = static_cast<const uint8_t*>(workspace) + 64;
    const bool is_finite = *static_cast<const bool*>(workspace);
    if (!is_finite && p.kept == 0) return kAvx512Bf16Linear24.run(p, x, begin, end);
    run_amx<Tiles, Weights::kOfXsDType>(p, x, begin, end);
    if (!is_finite) add_not_finite64(p, begin, end);
  }

  template <Weights kWeights>
  static const Product& few_int8(const Linear& p) {
    if (kWeights == Weights::kInt8) return p.kept == 0 ? kVnniLinear24Int8 : kVnniLinear64Int8;
    if (kWeights == Weights::kInt4) return p.kept == 0 ? kVnniLinear24Int4 : kVnniLinear64Int4;
    return kVnniLinearInt8;
  }
  template <Weights kWeights>
  static int64_t int8_bytes(const Linear& p) {
    return p.is_for_few_kernel() ? few_int8<kWeights>(p).workspace_bytes(p) : amx_int8_bytes(p);
  }
  template <Weights kWeights>
  static void prepare_int8(const Linear& p, void* workspace) {
    if (p.is_for_few_kernel()) return few_int8<kWeights>(p).prepare(p, workspace);
    prepare_amx_int8(p, workspace);
  }
  template <Weights kWeights>
  static void run_int8(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
    if (p.is_for_few_kernel()) return few_int8<kWeights>(p).run(p, workspace, begin, end);
    if constexpr (kWeights == Weights::kInt4) {
      if (p.scale_group == 64) return run_amx<Tiles, kWeights, 2>(p, workspace, begin, end);
      if (p.scale_group == 32) return run_amx<Tiles, kWeights, 4>(p, workspace, begin, end);
    }
    run_amx<Tiles, kWeights>(p, workspace, begin, end);
  }
  template <Weights kWeights>
  static constexpr Product kInt8 = {int8_bytes<kWeights>, prepare_int8<kWeights>,
                                    run_int8<kWeights>};
  // 2:4 and n of 64 alike.
  static constexpr Product kSparse = {bf16_bytes, prepare_bf16, run_bf16};
  static constexpr Product kSparseInt8 = kInt8<Weights::kInt8>;
  static constexpr Product kSparseInt4 = kInt8<Weights::kInt4>;
  static constexpr Product kDenseInt8 = kInt8<Weights::kDenseInt8>;
};

}  // namespace
}  // namespace cast
