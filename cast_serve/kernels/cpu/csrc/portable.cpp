// The 2:4 linear for any CPU: generic.h at the compiler's baseline.
#define CAST_ISA portable
#define CAST_LANES 4
#include "expansion.h"
#include "generic.h"
#include "generic_int8.h"

namespace cast {
static bool is_supported() { return true; }
const Kernel kPortable = {"portable",
                          is_supported,
                          &portable::kLinear24,
                          &portable::kLinear24Int8,
                          &portable::kLinear24Int4,
                          &portable::kLinearInt8,
                          &portable::kLinear64,
                          &portable::kLinear64,
                          &portable::kLinear64,
                          &portable::kExpansion,
                          false};
}  // namespace cast
