// The backward product with a 4-bit weight on Hopper's tensor cores: which tiles.
// SPDX-License-Identifier: MIT
#include "gpu/gemm/wgmma_dgrad.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "gpu/gemm/codes4.cuh"
#include "gpu/gemm/wgmma_dgrad_launch.cuh"

namespace bnb::gpu {
namespace {

DgradOperands operands_of(const Gemm4bitDgrad& args) {
  return {args.grad, args.weight.codes, args.out, args.m, args.weight.n, args.weight.k};
}

// Calls visit<T, Shape>().
template <class T, class Codes, class Visitor>
decltype(auto) with_shape(int64_t m, Visitor&& visit) {
  if (m <= 16) return visit.template operator()<T, Shape<Codes, 16>>();
  if (m <= 32) return visit.template operator()<T, Shape<Codes, 32>>();
  if (m <= 64) return visit.template operator()<T, Shape<Codes, 64>>();
  if (m <= 128) return visit.template operator()<T, Shape<Codes, 128>>();
  return visit.template operator()<T, Shape<Codes, 256>>();
}

template <class Visitor>
decltype(auto) with_type_and_shape(const Gemm4bitDgrad& args, Visitor&& visit) {
  return args.dtype == DType::kBFloat16 ? with_shape<BFloat16, Codes4<Half>>(args.m, visit)
                                        : with_shape<Half, Codes4<IntegerLevel>>(args.m, visit);
}

}  // namespace

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad& args) {
  return args.weight.code != Code4::kCount && dgrad_takes<64>(args.dtype, operands_of(args));
}

int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad& args) {
  return with_type_and_shape(
      args, [&]<class T, class S>() { return dgrad_workspace_bytes<S>(operands_of(args)); });
}

void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad& args, void* workspace, Stream stream) {
  with_type_and_shape(args, [&]<class T, class S>() {
    launch_dgrad<T, S>(operands_of(args), typename S::Codes(args.weight), workspace, stream);
  });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool wgmma_gemm_4bit_dgrad_serves(const Gemm4bitDgrad&) { return false; }
int64_t wgmma_gemm_4bit_dgrad_workspace_bytes(const Gemm4bitDgrad&) { return 0; }
void wgmma_gemm_4bit_dgrad(const Gemm4bitDgrad&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
