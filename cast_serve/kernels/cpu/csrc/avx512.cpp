// The 2:4 linear for x86 with AVX-512F: generic.h with 16 tokens in a vector.
#define CAST_ISA avx512
#define CAST_LANES 16
#include "generic.h"

namespace cast {
static bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("f16c");
}
const Kernel kAvx512 = {"avx512", is_supported, avx512::workspace_bytes_of, avx512::prepare_any,
                        avx512::run_any};
}  // namespace cast
