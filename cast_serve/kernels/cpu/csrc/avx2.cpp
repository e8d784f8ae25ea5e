// The 2:4 linear for x86 with AVX2, FMA and F16C: generic.h with 8 tokens in a vector.
#define CAST_ISA avx2
#define CAST_LANES 8
#include "expansion.h"
#include "generic.h"
#include "generic_int8.h"

namespace cast {
static bool is_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
const Kernel kAvx2 = {"avx2",
                      is_supported,
                      &avx2::kLinear24,
                      &avx2::kLinear24Int8,
                      &avx2::kLinear24Int4,
                      &avx2::kLinearInt8,
                      &avx2::kLinear64,
                      &avx2::kLinear64,
                      &avx2::kLinear64,
                      &avx2::kExpansion,
                      false};
}  // namespace cast
