// The backward product of the int8 layer on Hopper's tensor cores: which tiles. Other devices
// dequantize the weight to memory and leave the product to a library.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/kernels/int8.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_BULK_COPIES

#include "gpu/gemm/codes8.cuh"
#include "gpu/gemm/wgmma_dgrad_launch.cuh"

namespace bnb::gpu {
namespace {

// Beyond so many rows of grad a library makes up for the time that dequantizing takes.
constexpr int64_t kMostTokens = 1024;

DgradOperands operands_of(const Int8LinearDgrad& args) {
  return {args.grad, args.codes, args.out, args.m, args.n, args.k};
}

// Calls visit<T, Shape>().
template <class T, class Visitor>
decltype(auto) with_shape(int64_t m, Visitor&& visit) {
  if (m <= 32) return visit.template operator()<T, Shape<Codes8, 32>>();
  if (m <= 64) return visit.template operator()<T, Shape<Codes8, 64>>();
  if (m <= 128) return visit.template operator()<T, Shape<Codes8, 128>>();
  return visit.template operator()<T, Shape<Codes8, 256>>();
}

template <class Visitor>
decltype(auto) with_type_and_shape(const Int8LinearDgrad& args, Visitor&& visit) {
  return args.dtype == DType::kBFloat16 ? with_shape<BFloat16>(args.m, visit)
                                        : with_shape<Half>(args.m, visit);
}

}  // namespace

bool int8_linear_dgrad_is_fast(const Int8LinearDgrad& args) {
  return args.m <= kMostTokens && dgrad_takes<16>(args.dtype, operands_of(args));
}

int64_t int8_linear_dgrad_workspace_bytes(const Int8LinearDgrad& args) {
  return with_type_and_shape(
      args, [&]<class T, class S>() { return dgrad_workspace_bytes<S>(operands_of(args)); });
}

void int8_linear_dgrad(const Int8LinearDgrad& args, void* workspace, Stream stream) {
  with_type_and_shape(args, [&]<class T, class S>() {
    launch_dgrad<T, S>(operands_of(args), Codes8{args.stats}, workspace, stream);
  });
}

}  // namespace bnb::gpu

#else

namespace bnb::gpu {

bool int8_linear_dgrad_is_fast(const Int8LinearDgrad&) { return false; }
int64_t int8_linear_dgrad_workspace_bytes(const Int8LinearDgrad&) { return 0; }
void int8_linear_dgrad(const Int8LinearDgrad&, void*, Stream) {}

}  // namespace bnb::gpu

#endif  // BNB_BULK_COPIES
