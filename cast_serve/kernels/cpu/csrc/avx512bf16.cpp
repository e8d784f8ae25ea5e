// The 2:4 linear for x86 with AVX-512 BF16 and VBMI: bf16 by the kernels for few and for many
// tokens, other dtypes by avx512.cpp, 8-bit and 4-bit weights by avx512vnni.cpp.
#include "avx512bf16_64.h"
#include "avx512bf16_few.h"
#include "avx512bf16_many.h"
#include "linear24.h"

namespace cast {
namespace {

int64_t workspace_bytes(const Linear& p) {
  if (p.dtype != DType::kBFloat16) return kAvx512Linear24.workspace_bytes(p);
  return p.is_for_few_kernel() ? p.num_tokens * few_stride(p) * 2 : many_bytes(p);
}

void prepare(const Linear& p, void* workspace) {
  if (p.dtype != DType::kBFloat16) return kAvx512Linear24.prepare(p, workspace);
  if (p.is_for_few_kernel()) return prepare_few(p, static_cast<uint16_t*>(workspace));
  return prepare_many(p, workspace);
}

void run(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.dtype != DType::kBFloat16) return kAvx512Linear24.run(p, workspace, begin, end);
  if (p.is_for_few_kernel()) return run_few_prefetching<FewBf16>(p, workspace, begin, end);
  return run_many<ManyBf16>(p, {static_cast<const uint8_t*>(workspace), nullptr}, begin, end);
}

int64_t workspace_bytes64(const Linear& p) {
  return p.dtype != DType::kBFloat16 ? kAvx512Linear64.workspace_bytes(p) : bf16_x_bytes(p);
}

void prepare64(const Linear& p, void* workspace) {
  if (p.dtype != DType::kBFloat16) return kAvx512Linear64.prepare(p, workspace);
  prepare_bf16_x(p, workspace);
}

void run64(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.dtype != DType::kBFloat16) return kAvx512Linear64.run(p, workspace, begin, end);
  run_bf16_64(p, workspace, begin, end);
}

bool is_supported() { return kAvx512Vnni.is_supported() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

const Product kAvx512Bf16Linear24 = {workspace_bytes, prepare, run};
const Product kAvx512Bf16Linear64 = {workspace_bytes64, prepare64, run64};
const Kernel kAvx512Bf16 = {"avx512_bf16",
                            is_supported,
                            &kAvx512Bf16Linear24,
                            &kVnniLinear24Int8,
                            &kVnniLinear24Int4,
                            &kVnniLinearInt8,
                            &kAvx512Bf16Linear64,
                            &kVnniLinear64Int8,
                            &kVnniLinear64Int4,
                            &kAvx512Expansion,
                            true};

}  // namespace cast
