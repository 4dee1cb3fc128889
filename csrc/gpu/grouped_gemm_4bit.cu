// Products of groups of rows with a 4-bit weight for each group: which kernel makes them.
// SPDX-License-Identifier: MIT
#include <type_traits>

#include "bitsandbytes/kernels/grouped_gemm_4bit.h"
#include "gpu/gemm/mma_grouped.cuh"
#include "gpu/gemm/simt_grouped.cuh"

namespace bnb::gpu {

void grouped_gemm_4bit(const GroupedGemm4bit& args, Stream stream) {
  by_type(args.dtype, args.weight.scales.nested(), [&]<class T, bool kNested>() {
    if constexpr (kTensorProducts && !std::is_same_v<T, float>) {
      if (takes_grouped_mma(args)) return mma_grouped_gemm_4bit<T, kNested>(args, stream);
    }
    simt_grouped_gemm_4bit<T, kNested>(args, stream);
  });
}

void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, Stream stream) {
  by_type(args.dtype, args.weight.scales.nested(),
          [&]<class T, bool kNested>() { simt_grouped_gemm_4bit_dgrad<T, kNested>(args, stream); });
}

}  // namespace bnb::gpu
