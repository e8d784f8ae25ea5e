// The sparse linears for many tokens by torch's dense product (oneDNN's or MKL's): blocks of rows
// are expanded to dense in the cache, and multiplied there. Beside ops.cpp, which includes it, it
// is the only file that knows torch.
//
// bf16 weights are multiplied in bf16 with fp32 sums where the kernel's CPUs have instructions for
// that; a bias is rounded to bf16 there. All else is multiplied in fp32, where 8-bit and 16-bit
// weights and x are exact, and 4-bit weights times their scales too. For these and int8 weights x
// is quantised and multiplied with its scales first, which rounds each element to fp32 once more
// than reference.py; an int8 row's scale, then the bias, are applied to the fp32 sums.
// torch.set_float32_matmul_precision, whose default is fp32, holds here as for any product of
// torch.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>

#include "linear24.h"

namespace cast {

// Of a thread's block, at least, where it has as many: a few MiB, in L2 or L3. For fewer rows MKL
// takes longer for each.
constexpr int64_t kLibraryBlockRows = 256;

// A dropped weight is multiplied here, and 0 * Inf would be NaN. (x that is quantised may hold
// anything: Inf and NaN make the whole token NaN anyway.)
inline bool is_finite(const at::Tensor& x) {
  const auto [least, largest] = at::aminmax(x);  // NaN if there is one
  return std::isfinite(least.item<float>()) && std::isfinite(largest.item<float>());
}

// p's product -> out, whose memory is p.out. rows: p.x as a tensor [num_tokens, in_features]; bias:
// fp32 [out_features], or undefined.
inline void multiply_by_library(const Kernel& kernel, const Linear& p, const at::Tensor& rows,
                                const at::Tensor& bias, const at::Tensor& out) {
  const bool is_bf16 = kernel.has_bf16 && !p.has_integers() && p.dtype == DType::kBFloat16;
  at::Tensor x = rows, scale;
  if (p.has_integers()) {
    x = at::empty({p.num_tokens, p.padded_in_features()}, rows.options().dtype(at::kFloat));
    kernel.expansion->rounded_x(p, x.mutable_data_ptr<float>());
    if (p.scale != nullptr)
      scale = at::from_blob(const_cast<float*>(p.scale), {p.out_features}, x.options());
  } else if (!is_bf16) {
    x = rows.to(at::kFloat);
  }
  const at::Tensor out_rows = out.view({p.num_tokens, p.out_features});

  at::parallel_for(0, p.num_tile_rows(), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;  // these threads are not in x's inference mode
    // Nor in the caller's autocast, which would multiply the caller's own share in 16 bits.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const int64_t num_blocks =
        std::max<int64_t>((end - begin) * p.tile_rows() / kLibraryBlockRows, 1);
    const int64_t block = (end - begin + num_blocks - 1) / num_blocks;
    const at::Tensor dense =
        at::empty({block * p.tile_rows(), p.padded_in_features()}, x.options());
    for (int64_t tile_row = begin; tile_row < end; tile_row += block) {
      const int64_t block_end = std::min(tile_row + block, end), first = tile_row * p.tile_rows();
      const int64_t num_rows = std::min(block_end * p.tile_rows(), p.out_features) - first;
      if (is_bf16)
        kernel.expansion->bf16(p, tile_row, block_end, dense.mutable_data_ptr());
      else
        kernel.expansion->floats(p, tile_row, block_end, dense.mutable_data_ptr<float>());
      const at::Tensor weight = dense.narrow(0, 0, num_rows).narrow(1, 0, x.size(1)).t();
      at::Tensor sums;
      if (is_bf16 && bias.defined()) {  // before the sums are rounded to bf16
        sums = at::addmm(bias.narrow(0, first, num_rows).to(at::kBFloat16), x, weight);
      } else {
        sums = at::mm(x, weight);
        if (scale.defined()) sums.mul_(scale.narrow(0, first, num_rows));
        if (bias.defined()) sums.add_(bias.narrow(0, first, num_rows));
      }
      out_rows.narrow(1, first, num_rows).copy_(sums);
    }
  });
}

}  // namespace cast
