// The 2:4 linear for x86 with AVX-512 VNNI, VBMI, VBMI2 and GFNI: 8-bit and 4-bit weights by the
// kernels for few and for many tokens, 16-bit and 32-bit weights, which gain nothing from these, by
// avx512.cpp. Dense int8 weights, the head's, are for few tokens too: of many prompt tokens it sees
// the last alone.
#include <algorithm>

#include "avx512vnni64.h"
#include "avx512vnni_few.h"
#include "avx512vnni_many.h"
#include "avx512vnni_x.h"
#include "linear24.h"

namespace cast {
namespace {

int64_t workspace_bytes(const Linear& p) {
  return p.is_for_few_kernel() ? int8_few_bytes(p) : int8_many_bytes(p);
}

void prepare(const Linear& p, void* workspace) {
  return p.is_for_few_kernel() ? prepare_int8_few(p, workspace) : prepare_int8_many(p, workspace);
}

void run(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.is_for_few_kernel()) return run_few_prefetching<FewInt8>(p, workspace, begin, end);
  return run_int8_many<Weights::kInt8, 1>(p, workspace, begin, end);
}

template <int kGroups>
void run_int4_groups(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  if (p.is_for_few_kernel())
    return run_few_prefetching<FewInt4<kGroups>::template Rows>(p, workspace, begin, end);
  return run_int8_many<Weights::kInt4, kGroups>(p, workspace, begin, end);
}

void run_int4(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  switch (p.scale_group) {
    case 128:
      return run_int4_groups<1>(p, workspace, begin, end);
    case 64:
      return run_int4_groups<2>(p, workspace, begin, end);
    default:
      return run_int4_groups<4>(p, workspace, begin, end);
  }
}

// Dense weights: blocks of tokens as the kernel for few takes them, each with a workspace of its
// own.
Linear token_block(const Linear& p, int64_t first) {
  Linear block = p;
  block.num_tokens = std::min(p.num_tokens - first, kMostFewTokens);
  block.x = static_cast<const uint8_t*>(p.x) + first * p.x_stride * element_bytes(p.dtype);
  block.out = static_cast<uint8_t*>(p.out) + first * p.out_features * element_bytes(p.dtype);
  return block;
}

int64_t dense_block_bytes(const Linear& p) {
  Linear block = p;
  block.num_tokens = kMostFewTokens;
  return (int8_few_bytes(block) + 63) / 64 * 64;
}

int64_t dense_workspace_bytes(const Linear& p) {
  return (p.num_tokens + kMostFewTokens - 1) / kMostFewTokens * dense_block_bytes(p);
}

void prepare_dense(const Linear& p, void* workspace) {
  uint8_t* block_workspace = static_cast<uint8_t*>(workspace);
  for (int64_t first = 0; first < p.num_tokens; first += kMostFewTokens) {
    prepare_int8_few(token_block(p, first), block_workspace);
    block_workspace += dense_block_bytes(p);
  }
}

void run_dense(const Linear& p, const void* workspace, int64_t begin, int64_t end) {
  for (int64_t slab = begin; slab < end; slab += kFewSlabRows) {  // its weights stay in L2
    const int64_t slab_end = std::min(slab + kFewSlabRows, end);
    const uint8_t* block_workspace = static_cast<const uint8_t*>(workspace);
    for (int64_t first = 0; first < p.num_tokens; first += kMostFewTokens) {
      run_few_prefetching<FewDenseInt8>(token_block(p, first), block_workspace, slab, slab_end);
      block_workspace += dense_block_bytes(p);
    }
  }
}

bool is_supported() {
  return kAvx512.is_supported() && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("gfni");
}

}  // namespace

const Product kVnniLinear24Int8 = {workspace_bytes, prepare, run};
const Product kVnniLinear24Int4 = {workspace_bytes, prepare, run_int4};
const Product kVnniLinearInt8 = {dense_workspace_bytes, prepare_dense, run_dense};
const Product kVnniLinear64Int8 = {integer_x_bytes, prepare_integer_x, run_integers64<0>};
const Product kVnniLinear64Int4 = {integer_x_bytes, prepare_integer_x, run_int4_of_64};
const Kernel kAvx512Vnni = {"avx512_vnni",
                            is_supported,
                            &kAvx512Linear24,
                            &kVnniLinear24Int8,
                            &kVnniLinear24Int4,
                            &kVnniLinearInt8,
                            &kAvx512Linear64,
                            &kVnniLinear64Int8,
                            &kVnniLinear64Int4,
                            &kAvx512Expansion,
                            false};

}  // namespace cast
