// The linears for x86 with AMX; Intel has it from Sapphire Rapids on.
#include "amx.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace cast {
namespace {

bool is_supported() {
  static const bool is_granted = [] {
    if (!kAvx512Bf16.is_supported()) return false;
    unsigned eax = 7, ebx, ecx = 0, edx;
    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    if ((edx & amx) != amx) return false;
    constexpr int64_t request_permission = 0x1023, tile_data = 18;  // of Linux's arch_prctl
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return is_granted;
}

using Products = AmxProducts<AmxTiles>;

}  // namespace

const Kernel kAmx = {"amx",
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
