// The 2:4 linear for x86 with AVX-512 VNNI and VBMI: int8 weights by the kernels for few and
// for many tokens, 16-bit and 32-bit weights, which gain nothing from these, by avx512.cpp.
#include "avx512vnni_few.h"
#include "avx512vnni_many.h"
#include "avx512vnni_x.h"
#include "linear24.h"

namespace cast {
namespace {

bool is_few(const Linear24& p) { return p.num_tokens <= p.tuning.few_tokens_int8; }

int64_t workspace_bytes(const Linear24& p) {
  return is_few(p) ? int8_few_bytes(p) : int8_many_bytes(p);
}

void prepare(const Linear24& p, void* workspace) {
  return is_few(p) ? prepare_int8_few(p, workspace) : prepare_int8_many(p, workspace);
}

void run(const Linear24& p, const void* workspace, int64_t begin, int64_t end) {
  if (is_few(p)) return run_few_prefetching<FewInt8>(p, workspace, begin, end);
  return run_int8_many(p, workspace, begin, end);
}

bool is_supported() {
  return kAvx512.is_supported() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
}

}  // namespace

const Product kVnniLinear24Int8 = {workspace_bytes, prepare, run};
const Kernel kAvx512Vnni = {"avx512_vnni", is_supported, &kAvx512Linear24, &kVnniLinear24Int8};

}  // namespace cast
