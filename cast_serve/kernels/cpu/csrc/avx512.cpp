// The 2:4 linear for x86 with AVX-512F: generic.h with 16 tokens in a vector.
#define CAST_ISA avx512
#define CAST_LANES 16
#include "expansion.h"
#include "generic.h"
#include "generic_int8.h"

namespace cast {
static bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("f16c");
}
const Product kAvx512Linear24 = avx512::kLinear24;
const Product kAvx512Linear64 = avx512::kLinear64;
const Expansion kAvx512Expansion = avx512::kExpansion;
const Kernel kAvx512 = {"avx512",
                        is_supported,
                        &kAvx512Linear24,
                        &avx512::kLinear24Int8,
                        &avx512::kLinear24Int4,
                        &avx512::kLinearInt8,
                        &kAvx512Linear64,
                        &kAvx512Linear64,
                        &kAvx512Linear64,
                        &kAvx512Expansion,
                        false};
}  // namespace cast
