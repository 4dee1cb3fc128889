// Optimizer steps whose states are 8-bit codes with one absmax per tensor: rule x dtype. The
// preview has found the new absmax of every tensor, so that elements are independent of each other.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/philox.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/list.cuh"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kResident = 2;  // blocks of threads per multiprocessor
constexpr int64_t kTile = 8192;
constexpr int kGroup = kRoundingGroup;  // elements of a thread

// Code, tables and constants of a launch, in shared memory.
template <class R>
struct Shared {
  Code8<true> codes[R::kStates];
  EncodeTables<true> tables;
  Step<R> step;
};

// The step of up to kGroup consecutive elements.
template <class R, class T, bool kStochastic>
__device__ __forceinline__ void step_group(const OptimizerTensor& tensor, const Shared<R>& shared,
                                           const Step<R>& step, const float (&scale)[R::kStates],
                                           const float (&new_scale)[R::kStates],
                                           const PhiloxWords& random, int64_t i, bool aligned) {
  T* const param = static_cast<T*>(tensor.param) + i;
  const T* const grad = static_cast<const T*>(tensor.grad) + i;
  const int64_t left = tensor.n - i;
  const Pack<T, kGroup> g = load_pack<T, kGroup>(grad, left, aligned);
  Pack<T, kGroup> p = load_pack<T, kGroup>(param, left, aligned);
  uint8_t* state[R::kStates];
  Pack<uint8_t, kGroup> old[R::kStates];
  float states[R::kStates][kGroup];
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    state[k] = static_cast<uint8_t*>(tensor.state[k]) + i;
    old[k] = load_pack<uint8_t, kGroup>(state[k], left, aligned);
  }
#pragma unroll
  for (int e = 0; e < kGroup; ++e) {
    const float gradient = __fmul_rn(widen(g.values[e]), step.gnorm_scale);
    Scalar s[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      states[k][e] = __fmul_rn(shared.codes[k].levels[old[k].values[e]], scale[k]);
      s[k] = Scalar(states[k][e]);
    }
    const float updated = step.advance(Scalar(gradient), Scalar(widen(p.values[e])), s).v;
    if (step.skip_zeros && gradient == 0.0f) continue;
    // A gradient that is not finite has no use: its element loses the state and keeps the
    // parameter.
    const bool useful = is_finite(gradient);
    if (useful) {
      if constexpr (kStochastic) {
        p.values[e] = from_float_stochastic(updated, rounding_bits(random, e));
      } else {
        p.values[e] = narrow<T>(updated);
      }
    }
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) states[k][e] = useful ? finite_state(s[k].v) : 0.0f;
  }
  store_pack<T, kGroup>(param, p, left, aligned);
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    uint32_t words[kGroup / 4];
    shared.codes[k].encode(shared.tables, states[k], new_scale[k], words);
    Pack<uint8_t, kGroup> codes;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      codes.values[e] = static_cast<uint8_t>(words[e / 4] >> (8 * (e % 4)));
    }
    store_pack<uint8_t, kGroup>(state[k], codes, left, aligned);
  }
}

template <class R, class T, bool kStochastic>
__global__ void BNB_LAUNCH_BOUNDS(kThreads, kResident)
    optimizer_step_8bit_kernel(const BNB_GRID_CONSTANT StepList list) {
  BNB_DYNAMIC_SHARED(storage);
  __shared__ Shared<R> shared;
  const OptimizerStep& args = list.header.args;
  const Entries<StepList> entries(list, storage);
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) shared.codes[k].fill(args.qmap[k], shared.tables);
  make_step<R>(args, &shared.step);
  __syncthreads();
  Step<R> step = shared.step;
  for (uint32_t tile = blockIdx.x; tile < list.header.tiles; tile += gridDim.x) {
    const int e = entries.find(tile);
    if (has_factors(args)) step = step_of_tensor(shared.step, list, e);
    const auto& entry = entries[e];
    const int index = list.header.tensors_before + e;
    float scale[R::kStates];
    float new_scale[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      scale[k] = args.max[k][index];
      new_scale[k] = args.new_max[k][index];
    }
    const int64_t begin = int64_t{tile - entry.first_tile} * kTile;
    const int64_t end = min(begin + kTile, entry.tensor.n);
    for (int64_t i = begin + threadIdx.x * kGroup; i < end; i += kThreads * kGroup) {
      PhiloxWords random{};
      if constexpr (kStochastic) {
        random = rounding_words(args.seed, i / kRoundingGroup, static_cast<uint32_t>(index),
                                *args.step + 1);
      }
      step_group<R, T, kStochastic>(entry.tensor, shared, step, scale, new_scale, random, i,
                                    entry.packs != 0);
    }
  }
  leave_step(list);
}

using Kernel = void (*)(const StepList);

template <class R, class T>
Kernel choose(bool stochastic) {
  if constexpr (R::kStates > 2) {
    return nullptr;  // the op has refused it
  } else {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (stochastic) return optimizer_step_8bit_kernel<R, T, true>;
    }
    return optimizer_step_8bit_kernel<R, T, false>;
  }
}

}  // namespace

void optimizer_step_8bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                         Stream stream) {
  const Kernel kernel = choose_by_types<Kernel>(args.rule, args.dtype, [&]<class R, class T>() {
    return choose<R, T>(args.stochastic_rounding);
  });
  const int states = kRules[static_cast<int>(args.rule)].states;
  const int size = args.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident;
  const auto packs = [&](const OptimizerTensor& t) {
    bool aligned = is_aligned(t.param, kGroup * size) && is_aligned(t.grad, kGroup * size);
    for (int k = 0; k < states; ++k) aligned = aligned && is_aligned(t.state[k], kGroup);
    return aligned;
  };
  const int most = entries_for<StepList>(reinterpret_cast<const void*>(kernel), kResident);
  for_each_launch<StepList>(args, tensors, kTile, 0, most, packs, [&](const StepList& list) {
    const int blocks = step_blocks(list, std::min<int64_t>(list.header.tiles, most_blocks));
    if (blocks == 0) return;
    launch("optimizer_step_8bit", kernel, blocks, kThreads, entry_bytes(list), stream, list);
  });
}

}  // namespace bnb::gpu
