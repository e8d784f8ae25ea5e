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
                             &Products::kSparse,
                             &Products::kSparseInt8,
                             &Products::kSparseInt4,
                             &Products::kDenseInt8,
                             &Products::kSparse,
                             &Products::kSparseInt8,
                             &Products::kSparseInt4,
                             &kAvx512Expansion,
                             true};

}  // namespace cast
