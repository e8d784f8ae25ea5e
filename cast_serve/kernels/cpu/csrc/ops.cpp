// torch binding of the ops at its end. It turns tensors into pointers, and wrong arguments into
// exceptions.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "library.h"
#include "linear64.h"

namespace {

using at::Tensor;

const std::vector<const cast::Kernel*>& kernels() {  // best first
  static const std::vector<const cast::Kernel*> all = {
#ifdef __x86_64__
      &cast::kAmx,         &cast::kAvx512Bf16, &cast::kAvx512Vnni, &cast::kAvx512, &cast::kAvx2,
#endif
      &cast::kPortable,
#ifdef __x86_64__
      &cast::kAmxEmulated,  // after the portable one, so that it is never picked unasked
#endif
  };
  return all;
}

const cast::Kernel& pick_kernel() {
  const char* forced = std::getenv("CAST_CPU_ISA");
  std::string names;
  for (const cast::Kernel* kernel : kernels()) {
    if (!kernel->is_supported()) continue;
    if (forced == nullptr || forced == std::string(kernel->isa) || forced == std::string("auto"))
      return *kernel;
    names += std::string(names.empty() ? "" : ", ") + kernel->isa;
  }
  TORCH_CHECK(false, "CAST_CPU_ISA=", forced, " is not a kernel of this CPU; it has: ", names,
              "; unset CAST_CPU_ISA to take the best");
}

const cast::Kernel& kernel() {
  static const cast::Kernel& picked = pick_kernel();
  return picked;
}

// AMD's vpermi2w and vpermi2b cost one micro-operation, Intel's three; AMX needs neither.
cast::Tuning default_tuning() {
#ifdef __x86_64__
  if (&kernel() == &cast::kAmx) return {2, 2, 2, cast::Prefetch::kT1};
#endif
  bool is_amd = false;
#ifdef __x86_64__
  is_amd = __builtin_cpu_is("amd");
#endif
  const int64_t few_tokens = is_amd ? 8 : 4;
  return {few_tokens, few_tokens, few_tokens, cast::Prefetch::kT0};
}

cast::Tuning& tuning() {
  static cast::Tuning current = default_tuning();
  return current;
}

constexpr const char* kPrefetchNames[] = {"none", "t0", "t1"};  // in the order of cast::Prefetch

std::tuple<int64_t, int64_t, int64_t, std::string, int64_t, int64_t> cpu_tuning() {
  const cast::Tuning& now = tuning();
  const char* prefetch = kPrefetchNames[static_cast<int>(now.prefetch)];
  return {now.few_tokens, now.few_tokens_int8, now.few_tokens_int4,
          prefetch,       now.library_tokens,  now.library_tokens_int8};
}

void set_cpu_tuning(int64_t few_tokens, int64_t few_tokens_int8, int64_t few_tokens_int4,
                    const std::string& prefetch, int64_t library_tokens,
                    int64_t library_tokens_int8) {
  for (const int64_t tokens : {few_tokens, few_tokens_int8, few_tokens_int4})
    TORCH_CHECK_VALUE(0 <= tokens && tokens <= cast::kMostFewTokens,
                      "set_cpu_tuning: the kernel for few tokens takes 0 to ", cast::kMostFewTokens,
                      " of them, not ", tokens);
  for (const int64_t tokens : {library_tokens, library_tokens_int8})
    TORCH_CHECK_VALUE(tokens == 0 || tokens >= cast::kLeastLibraryTokens,
                      "set_cpu_tuning: the library multiplies from ", cast::kLeastLibraryTokens,
                      " tokens on, or never, which is 0; not from ", tokens);
  for (int i = 0; i < 3; ++i)
    if (prefetch == kPrefetchNames[i]) {
      tuning() = {few_tokens,      few_tokens_int8,
                  few_tokens_int4, static_cast<cast::Prefetch>(i),
                  library_tokens,  library_tokens_int8};
      return;
    }
  TORCH_CHECK_VALUE(false, "set_cpu_tuning: prefetch is \"", prefetch,
                    "\"; none, t0 or t1 is needed");
}

cast::DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return cast::DType::kBFloat16;
    case at::kHalf:
      return cast::DType::kFloat16;
    case at::kFloat:
      return cast::DType::kFloat32;
    default:
      TORCH_CHECK_TYPE(false, op, ": x is ", x.scalar_type(),
                       "; bfloat16, float16 or float32 is needed");
  }
}

// A call's tensors as the kernels see them. The members keep alive what `p` points to.
struct Call {
  cast::Linear p;
  Tensor rows, float_bias, out;
};

using cast::Weights;

int64_t tile_bytes_of(const cast::Linear& p, Weights weights) {
  if (p.kept != 0) return cast::tile_bytes64(p);
  switch (weights) {
    case Weights::kInt8:
      return cast::kInt8TileBytes;
    case Weights::kInt4:
      return p.int4_tile_bytes();
    case Weights::kDenseInt8:
      return cast::kDenseInt8TileBytes;
    default:
      return cast::kTileRows * (cast::kTileKept * (p.dtype == cast::DType::kFloat32 ? 4 : 2) + 8);
  }
}

// What only some weights have.
struct More {
  int64_t scale_group = 0;       // of 4-bit weights
  int64_t kept = 0;              // of 64 columns; 0: 2:4
  const float* scale = nullptr;  // of 8-bit weights
};

Call checked(const char* op, const Tensor& x, const Tensor& packed, int64_t out_features,
             const std::optional<Tensor>& bias, Weights weights, const More& more = {}) {
  Call call;
  cast::Linear& p = call.p;
  p.dtype = dtype_of(op, x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimension; [..., in_features] is needed");
  p.in_features = x.size(-1);
  p.out_features = out_features;
  const int64_t multiple = more.kept == 0 ? 4 : cast::kTileColumns;
  TORCH_CHECK_VALUE(p.in_features > 0 && p.in_features % multiple == 0, op, ": in_features ",
                    p.in_features, " is not a positive multiple of ", multiple);
  p.scale_group = more.scale_group;
  p.kept = more.kept;
  p.scale = more.scale;
  const int64_t tile_columns =
      weights == Weights::kOfXsDType ? p.num_tile_columns() : p.num_int8_tile_columns();
  const int64_t tile_bytes = tile_bytes_of(p, weights);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.dim() == 3 &&
                        packed.is_contiguous() && packed.size(0) == p.num_tile_rows() &&
                        packed.size(1) == tile_columns && packed.size(2) == tile_bytes,
                    op, ": packed is ", packed.scalar_type(), " ", packed.sizes(), ", but x ",
                    x.sizes(), " of ", x.scalar_type(), " and out_features ", out_features,
                    " need a contiguous uint8 [", p.num_tile_rows(), ", ", tile_columns, ", ",
                    tile_bytes, "]");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 == 0, op,
                    ": packed does not begin at a 64-byte boundary; pass packed.clone()");
  call.rows = x.reshape({-1, p.in_features});
  if (call.rows.stride(1) != 1) call.rows = call.rows.contiguous();
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias is ",
                      bias->sizes(), "; [", out_features, "] is needed");
    call.float_bias = bias->to(at::kFloat).contiguous();
  }
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  call.out = at::empty(sizes, x.options());

  p.x = call.rows.const_data_ptr();
  p.x_stride = call.rows.stride(0);
  p.packed = packed.const_data_ptr<uint8_t>();
  p.bias = bias.has_value() ? call.float_bias.const_data_ptr<float>() : nullptr;
  p.out = call.out.mutable_data_ptr();
  p.num_tokens = call.rows.size(0);
  p.tuning = tuning();
  return call;
}

Tensor computed(const cast::Product& product, const Call& call) {
  const cast::Linear& p = call.p;
  if (call.out.numel() == 0) return call.out;
  Tensor workspace = at::empty({product.workspace_bytes(p)}, call.rows.options().dtype(at::kByte));
  product.prepare(p, workspace.mutable_data_ptr());
  at::parallel_for(0, p.num_tile_rows(), 1, [&](int64_t begin, int64_t end) {
    product.run(p, workspace.const_data_ptr(), begin, end);
  });
  return call.out;
}

bool is_for_library(const cast::Linear& p, int64_t least_tokens) {
  return least_tokens > 0 && p.num_tokens >= least_tokens && p.out_features > 0;
}

Tensor computed_by_library(const Call& call) {
  cast::multiply_by_library(kernel(), call.p, call.rows, call.float_bias, call.out);
  return call.out;
}

Tensor linear24(const Tensor& x, const Tensor& packed, int64_t out_features,
                const std::optional<Tensor>& bias) {
  const Call call = checked("linear24", x, packed, out_features, bias, Weights::kOfXsDType);
  if (is_for_library(call.p, call.p.tuning.library_tokens) && cast::is_finite(call.rows))
    return computed_by_library(call);
  return computed(*kernel().linear24, call);
}

const float* row_scales(const char* op, const Tensor& scale, int64_t out_features) {
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.dim() == 1 &&
                        scale.size(0) == out_features && scale.is_contiguous(),
                    op, ": scale is ", scale.scalar_type(), " ", scale.sizes(),
                    "; a contiguous float32 [", out_features, "] is needed");
  return scale.const_data_ptr<float>();
}

Call checked_int8(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale,
                  int64_t out_features, const std::optional<Tensor>& bias, Weights weights) {
  Call call = checked(op, x, packed, out_features, bias, weights);
  call.p.scale = row_scales(op, scale, out_features);
  return call;
}

Tensor linear24_int8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                     int64_t out_features, const std::optional<Tensor>& bias) {
  const Call call =
      checked_int8("linear24_int8", x, packed, scale, out_features, bias, Weights::kInt8);
  if (is_for_library(call.p, call.p.tuning.library_tokens_int8)) return computed_by_library(call);
  return computed(*kernel().linear24_int8, call);
}

void check_scale_group(const char* op, int64_t group) {
  TORCH_CHECK_VALUE(group == 128 || group == 64 || group == 32, op, ": a scale group of ", group,
                    " columns is none of 128, 64 and 32");
}

Tensor linear24_int4(const Tensor& x, const Tensor& packed, int64_t group, int64_t out_features,
                     const std::optional<Tensor>& bias) {
  check_scale_group("linear24_int4", group);
  const Call call = checked("linear24_int4", x, packed, out_features, bias, Weights::kInt4,
                            {.scale_group = group});
  if (is_for_library(call.p, call.p.tuning.library_tokens_int8)) return computed_by_library(call);
  return computed(*kernel().linear24_int4, call);
}

// scale: of 8-bit weights; scale_group: of 4-bit weights, else 0.
Tensor linear64(const Tensor& x, const Tensor& packed, int64_t kept, int64_t out_features,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                int64_t scale_group) {
  const char* op = "linear64";
  TORCH_CHECK_VALUE(0 < kept && kept < 64 + (scale_group != 0), op, ": ", kept,
                    " of 64 columns are kept; 1 to 63 is needed, or 64 in 4 bits");
  TORCH_CHECK_VALUE(!scale.has_value() || scale_group == 0, op,
                    ": scale is of 8-bit weights and scale_group of 4-bit ones; pass one of them");
  if (scale_group != 0) check_scale_group(op, scale_group);
  More more = {.scale_group = scale_group, .kept = kept};
  if (scale.has_value()) more.scale = row_scales(op, *scale, out_features);
  const bool has_integers = scale_group != 0 || scale.has_value();
  // Any integer weights: it says how many columns a tile has.
  const Weights weights = has_integers ? Weights::kInt8 : Weights::kOfXsDType;
  const Call call = checked(op, x, packed, out_features, bias, weights, more);
  const cast::Tuning& now = call.p.tuning;
  if (is_for_library(call.p, has_integers ? now.library_tokens_int8 : now.library_tokens) &&
      (has_integers || cast::is_finite(call.rows)))
    return computed_by_library(call);
  return computed(scale_group != 0    ? *kernel().linear64_int4
                  : scale.has_value() ? *kernel().linear64_int8
                                      : *kernel().linear64,
                  call);
}

Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale, int64_t out_features,
                   const std::optional<Tensor>& bias) {
  return computed(*kernel().linear_int8, checked_int8("linear_int8", x, packed, scale, out_features,
                                                      bias, Weights::kDenseInt8));
}

std::vector<std::string> cpu_isas() {  // the one in use first, then the others that this CPU has
  std::vector<std::string> names = {kernel().isa};
  for (const cast::Kernel* other : kernels())
    if (other != &kernel() && other->is_supported()) names.push_back(other->isa);
  return names;
}

}  // namespace

TORCH_LIBRARY(cast, m) {
  m.def("linear24(Tensor x, Tensor packed, int out_features, Tensor? bias=None) -> Tensor");
  m.def(
      "linear24_int8(Tensor x, Tensor packed, Tensor scale, int out_features, Tensor? bias=None) "
      "-> Tensor");
  m.def(
      "linear24_int4(Tensor x, Tensor packed, int group, int out_features, Tensor? bias=None) "
      "-> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scale, int out_features, Tensor? bias=None) "
      "-> Tensor");
  m.def(
      "linear64(Tensor x, Tensor packed, int kept, int out_features, Tensor? bias=None, "
      "Tensor? scale=None, int scale_group=0) -> Tensor");
  m.def("cpu_isas() -> str[]", &cpu_isas);
  m.def("cpu_tuning() -> (int, int, int, str, int, int)", &cpu_tuning);
  m.def(
      "set_cpu_tuning(int few_tokens, int few_tokens_int8, int few_tokens_int4, str prefetch, "
      "int library_tokens, int library_tokens_int8) -> ()",
      &set_cpu_tuning);
}

TORCH_LIBRARY_IMPL(cast, CPU, m) {
  m.impl("linear24", &linear24);
  m.impl("linear24_int8", &linear24_int8);
  m.impl("linear24_int4", &linear24_int4);
  m.impl("linear_int8", &linear_int8);
  m.impl("linear64", &linear64);
}
