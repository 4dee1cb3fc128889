// Optimizer steps whose states are floats: rule x dtype. A block of threads takes a tile of one
// tensor at a time, a thread 16 bytes of parameters and gradients.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/philox.h"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/list.cuh"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kResident = 4;  // blocks of threads per multiprocessor, at most
constexpr int64_t kTile = 8192;

// The step of kPack consecutive elements, as many of which are valid as there are left.
template <class R, class T, bool kStochastic, int kPack>
__device__ __forceinline__ void step_pack(const OptimizerTensor& tensor, const Step<R>& step,
                                          const PhiloxWords& random, int64_t i, bool aligned) {
  constexpr int kStatePack = 4;  // 16 bytes
  T* const param = static_cast<T*>(tensor.param) + i;
  const T* const grad = static_cast<const T*>(tensor.grad) + i;
  const int64_t left = tensor.n - i;
  const Pack<T, kPack> g = load_pack<T, kPack>(grad, left, aligned);
  Pack<T, kPack> p = load_pack<T, kPack>(param, left, aligned);
  float* state[R::kStates];
  Pack<float, kStatePack> s[R::kStates][kPack / kStatePack];
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    state[k] = static_cast<float*>(state_pointer(tensor, R::kStates, k, sizeof(float))) + i;
#pragma unroll
    for (int v = 0; v < kPack / kStatePack; ++v) {
      s[k][v] =
          load_pack<float, kStatePack>(state[k] + v * kStatePack, left - v * kStatePack, aligned);
    }
  }
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const float gradient = __fmul_rn(widen(g.values[j]), step.gnorm_scale);
    Scalar states[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      states[k] = Scalar(s[k][j / kStatePack].values[j % kStatePack]);
    }
    const float updated = step.advance(Scalar(gradient), Scalar(widen(p.values[j])), states).v;
    if (step.skip_zeros && gradient == 0.0f) continue;
    if constexpr (kStochastic) {
      static_assert(kPack == kRoundingGroup);
      p.values[j] = from_float_stochastic(updated, rounding_bits(random, j));
    } else {
      p.values[j] = narrow<T>(updated);
    }
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      s[k][j / kStatePack].values[j % kStatePack] = states[k].v;
    }
  }
  store_pack<T, kPack>(param, p, left, aligned);
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
#pragma unroll
    for (int v = 0; v < kPack / kStatePack; ++v) {
      store_pack<float, kStatePack>(state[k] + v * kStatePack, s[k][v], left - v * kStatePack,
                                    aligned);
    }
  }
}

template <class R, class T, bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    optimizer_step_32bit_kernel(const BNB_GRID_CONSTANT StepList list) {
  constexpr int kPack = kPackSize<T>;
  BNB_DYNAMIC_SHARED(storage);
  __shared__ Step<R> shared_step;
  const OptimizerStep& args = list.header.args;
  const Entries<StepList> entries(list, storage);
  make_step<R>(args, &shared_step);
  __syncthreads();
  Step<R> step = shared_step;
  for (uint32_t tile = blockIdx.x; tile < list.header.tiles; tile += gridDim.x) {
    const int e = entries.find(tile);
    if (has_factors(args)) step = step_of_tensor(shared_step, list, e);
    const auto& entry = entries[e];
    const int64_t begin = int64_t{tile - entry.first_tile} * kTile;
    const int64_t end = min(begin + kTile, entry.tensor.n);
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      PhiloxWords random{};
      if constexpr (kStochastic) {
        const auto tensor = static_cast<uint32_t>(list.header.tensors_before + e);
        random = rounding_words(args.seed, i / kRoundingGroup, tensor, *args.step + 1);
      }
      step_pack<R, T, kStochastic, kPack>(entry.tensor, step, random, i, entry.packs != 0);
    }
  }
  leave_step(list);
}

using Kernel = void (*)(const StepList);

template <class R, class T>
Kernel choose(bool stochastic) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (stochastic) return optimizer_step_32bit_kernel<R, T, true>;
  }
  return optimizer_step_32bit_kernel<R, T, false>;
}

}  // namespace

void optimizer_step_32bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                          Stream stream) {
  const Kernel kernel = choose_by_types<Kernel>(args.rule, args.dtype, [&]<class R, class T>() {
    return choose<R, T>(args.stochastic_rounding);
  });
  const int states = kRules[static_cast<int>(args.rule)].states;
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident;
  const auto packs = [&](const OptimizerTensor& t) {
    bool aligned = is_aligned(t.param, 16) && is_aligned(t.grad, 16);
    for (int k = 0; k < states; ++k) {
      aligned = aligned && is_aligned(state_pointer(t, states, k, sizeof(float)), 16);
    }
    return aligned;
  };
  const int most = entries_for<StepList>(reinterpret_cast<const void*>(kernel), kResident);
  for_each_launch<StepList>(args, tensors, kTile, 0, most, packs, [&](const StepList& list) {
    const int blocks = step_blocks(list, std::min<int64_t>(list.header.tiles, most_blocks));
    if (blocks == 0) return;
    launch("optimizer_step_32bit", kernel, blocks, kThreads, entry_bytes(list), stream, list);
  });
}

}  // namespace bnb::gpu
