// The AMX kernel with AMX's instructions computed in C++: slow, for tests on CPUs without AMX. It
// runs only where CAST_CPU_ISA names it.
#include "amx.h"

namespace cast {
namespace {

bool is_supported() { return kAvx512Bf16.is_supported(); }

using Products = AmxProducts<EmulatedTiles>;

}  // namespace

const Kernel kAmxEmulated = {"amx_emulated",
                             is_supported,
                             &Products::kLinear24,
                             &Products::kLinear24Int8,
                             &Products::kLinear24Int4,
                             &Products::kLinearInt8,
                             &kAvx512Bf16Linear64,
                             &kVnniLinear64Int8,
                             &kVnniLinear64Int4,
                             &kAvx512Expansion,
                             true};

}  // namespace cast
