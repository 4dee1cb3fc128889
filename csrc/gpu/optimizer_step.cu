// One optimizer step over a whole list of tensors: rule x precision of the states x dtype.
//
// The list travels as a kernel argument: no copy to the device, and a captured graph keeps it. Each
// block of threads takes tiles of the list in turn; a tile lies within one tensor. In the 8-bit
// kernel a warp owns a quantization block of 256 elements: 8 per lane, their absmax one warp
// reduction away, no barrier.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "bitsandbytes/optim/step.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileBlocks = 32;  // quantization blocks of a tile: 8192 elements
constexpr int64_t kTile = int64_t{kTileBlocks} * kOptimizerBlock;
constexpr int kLaneElements = kOptimizerBlock / kWarp;
// Blocks of threads per multiprocessor, and the registers they leave each other.
constexpr int kResident = 4;

struct Entry {
  OptimizerTensor tensor;
  int64_t first_tile;  // of the launch
};

struct Arguments {
  Hyper hyper;
  const int64_t* step;
  const float* lr;
  const float* qmap[2];
  int64_t tiles;
  int count;
};

constexpr int kMaxTensors = (BNB_KERNEL_ARGUMENT_BYTES - static_cast<int>(sizeof(Arguments))) /
                            static_cast<int>(sizeof(Entry));

struct TensorList {
  Arguments args;
  Entry entries[kMaxTensors];
};

// The entry that holds a tile: the last one that starts at or before it.
__device__ __forceinline__ int find_entry(const TensorList& list, int64_t tile) {
  int low = 0;
  int high = list.args.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.entries[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Packs of T that cover a lane's share of a quantization block, lanes in order within each pack
// row.
template <class T>
struct LaneShare {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kPacks = kLaneElements / kPack;
};

template <class R, class T>
__global__ void __launch_bounds__(kThreads, kResident)
    optimizer_step_8bit_blockwise_kernel(const BNB_GRID_CONSTANT TensorList list) {
  using Layout = UnsignedDynamic8::Layout;
  constexpr int kPack = LaneShare<T>::kPack;
  constexpr int kPacks = LaneShare<T>::kPacks;
  __shared__ Code8Storage<Layout> codes[R::kStates];
  __shared__ Step<R> step;
  for (int k = 0; k < R::kStates; ++k) Code8<Layout>::fill(codes[k], list.args.qmap[k]);
  if (threadIdx.x == 0) step = Step<R>::make(list.args.hyper, *list.args.step, list.args.lr);
  __syncthreads();
  const Step<R> rule = step;

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t tile = blockIdx.x; tile < list.args.tiles; tile += gridDim.x) {
    const Entry& entry = list.entries[find_entry(list, tile)];
    const int64_t n = entry.tensor.n;
    T* const param = static_cast<T*>(entry.tensor.param);
    const T* const grad = static_cast<const T*>(entry.tensor.grad);
    bool aligned = is_aligned(param, 16) && is_aligned(grad, 16);
    for (int k = 0; k < R::kStates; ++k) {
      aligned = aligned && is_aligned(entry.tensor.state[k], kPack);
    }
    const int64_t first_block = (tile - entry.first_tile) * kTileBlocks;
    for (int turn = warp; turn < kTileBlocks; turn += kWarps) {
      const int64_t block = first_block + turn;
      const int64_t begin = block * kOptimizerBlock;
      if (begin >= n) break;
      Pack<T, kPack> p[kPacks];
      Pack<T, kPack> g[kPacks];
      Pack<uint8_t, kPack> c[R::kStates][kPacks];
      float scale[R::kStates];
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        const int64_t i = begin + (v * kWarp + lane) * kPack;
        g[v] = load_pack<T, kPack>(grad + i, n - i, aligned);
        p[v] = load_pack<T, kPack>(param + i, n - i, aligned);
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) {
          const uint8_t* state = static_cast<const uint8_t*>(entry.tensor.state[k]);
          c[k][v] = load_pack<uint8_t, kPack>(state + i, n - i, aligned);
        }
      }
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) scale[k] = entry.tensor.absmax[k][block];

      float states[R::kStates][kLaneElements];
      uint32_t most[R::kStates] = {};
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const int e = v * kPack + j;
          const float gradient = widen(g[v].values[j]) * rule.gnorm_scale;
          const float old_param = widen(p[v].values[j]);
          float old[R::kStates];
          float s[R::kStates];
#pragma unroll
          for (int k = 0; k < R::kStates; ++k) {
            old[k] = s[k] = __fmul_rn(codes[k].levels[c[k][v].values[j]], scale[k]);
          }
          float updated = rule.advance(gradient, old_param, s);
          // One bad gradient would spoil the scale of its whole block: that element loses its state
          // and keeps its parameter.
          const bool finite = is_finite(gradient);
          const bool skip = rule.skip_zeros && gradient == 0.0f;
          if (!finite || skip) updated = old_param;
          p[v].values[j] = narrow<T>(updated);
          const bool exists = begin + (v * kWarp + lane) * kPack + j < n;
#pragma unroll
          for (int k = 0; k < R::kStates; ++k) {
            float kept = fmaxf(fminf(s[k], kFloatMax), -kFloatMax);
            kept = finite ? kept : 0.0f;
            kept = skip ? old[k] : kept;
            kept = exists ? kept : 0.0f;
            states[k][e] = kept;
            most[k] = max(most[k], magnitude_bits(kept));
          }
        }
      }
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        const float absmax = absmax_from_bits(warp_max(most[k]));
        if (lane == 0) entry.tensor.absmax[k][block] = absmax;
        uint8_t out[kLaneElements];
        Code8<Layout>::encode<true>(codes[k], states[k], absmax, out);
#pragma unroll
        for (int v = 0; v < kPacks; ++v) {
#pragma unroll
          for (int j = 0; j < kPack; ++j) c[k][v].values[j] = out[v * kPack + j];
        }
      }
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        const int64_t i = begin + (v * kWarp + lane) * kPack;
        store_pack<T, kPack>(param + i, p[v], n - i, aligned);
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) {
          uint8_t* state = static_cast<uint8_t*>(entry.tensor.state[k]);
          store_pack<uint8_t, kPack>(state + i, c[k][v], n - i, aligned);
        }
      }
    }
  }
}

template <class R, class T>
__global__ void __launch_bounds__(kThreads)
    optimizer_step_32bit_kernel(const BNB_GRID_CONSTANT TensorList list) {
  constexpr int kPack = 4;  // 16 bytes of state
  __shared__ Step<R> step;
  if (threadIdx.x == 0) step = Step<R>::make(list.args.hyper, *list.args.step, list.args.lr);
  __syncthreads();
  const Step<R> rule = step;

  for (int64_t tile = blockIdx.x; tile < list.args.tiles; tile += gridDim.x) {
    const Entry& entry = list.entries[find_entry(list, tile)];
    const int64_t n = entry.tensor.n;
    T* const param = static_cast<T*>(entry.tensor.param);
    const T* const grad = static_cast<const T*>(entry.tensor.grad);
    bool aligned = is_aligned(param, kPack * sizeof(T)) && is_aligned(grad, kPack * sizeof(T));
    for (int k = 0; k < R::kStates; ++k) {
      aligned = aligned && is_aligned(entry.tensor.state[k], 16);
    }
    const int64_t begin = (tile - entry.first_tile) * kTile;
    const int64_t end = min(begin + kTile, n);
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      Pack<T, kPack> g = load_pack<T, kPack>(grad + i, n - i, aligned);
      Pack<T, kPack> p = load_pack<T, kPack>(param + i, n - i, aligned);
      Pack<float, kPack> s[R::kStates];
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        const float* state = static_cast<const float*>(entry.tensor.state[k]);
        s[k] = load_pack<float, kPack>(state + i, n - i, aligned);
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float gradient = widen(g.values[j]) * rule.gnorm_scale;
        float states[R::kStates];
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) states[k] = s[k].values[j];
        const float updated = rule.advance(gradient, widen(p.values[j]), states);
        if (rule.skip_zeros && gradient == 0.0f) continue;
        p.values[j] = narrow<T>(updated);
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) s[k].values[j] = states[k];
      }
      store_pack<T, kPack>(param + i, p, n - i, aligned);
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        store_pack<float, kPack>(static_cast<float*>(entry.tensor.state[k]) + i, s[k], n - i,
                                 aligned);
      }
    }
  }
}

using Kernel = void (*)(const TensorList);

// Launches `kernel` over the list, as many tensors at a time as the kernel arguments hold.
void launch(Kernel kernel, const char* name, const OptimizerStep& step,
            std::span<const OptimizerTensor> tensors, int resident, Stream stream) {
  TensorList list;
  list.args = {step.hyper, step.step, step.lr, {step.qmap[0], step.qmap[1]}, 0, 0};
  const int most_blocks = multiprocessors() * resident;
  const auto flush = [&] {
    if (list.args.count == 0) return;
    const int blocks = static_cast<int>(std::min<int64_t>(list.args.tiles, most_blocks));
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(list);
    check(cudaGetLastError(), name, __FILE__, __LINE__);
    list.args.count = 0;
    list.args.tiles = 0;
  };
  for (const OptimizerTensor& tensor : tensors) {
    if (tensor.n == 0) continue;
    if (list.args.count == kMaxTensors) flush();
    list.entries[list.args.count++] = {tensor, list.args.tiles};
    list.args.tiles += ceil_div(tensor.n, kTile);
  }
  flush();
}

template <class R>
Kernel kernel_32bit(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return optimizer_step_32bit_kernel<R, Half>;
    case DType::kBFloat16:
      return optimizer_step_32bit_kernel<R, BFloat16>;
    default:
      return optimizer_step_32bit_kernel<R, float>;
  }
}

template <class R>
Kernel kernel_8bit_blockwise(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return optimizer_step_8bit_blockwise_kernel<R, Half>;
    case DType::kBFloat16:
      return optimizer_step_8bit_blockwise_kernel<R, BFloat16>;
    default:
      return optimizer_step_8bit_blockwise_kernel<R, float>;
  }
}

}  // namespace

void optimizer_step_32bit(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                          Stream stream) {
  Kernel kernel = nullptr;
  switch (args.rule) {
#define BNB_CASE(rule)                       \
  case Rule::k##rule:                        \
    kernel = kernel_32bit<rule>(args.dtype); \
    break;
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      return;
  }
  launch(kernel, "launch of optimizer_step_32bit_kernel", args, tensors, 2 * kResident, stream);
}

void optimizer_step_8bit_blockwise(const OptimizerStep& args,
                                   std::span<const OptimizerTensor> tensors, Stream stream) {
  Kernel kernel = nullptr;
  switch (args.rule) {
#define BNB_CASE(rule)                                \
  case Rule::k##rule:                                 \
    kernel = kernel_8bit_blockwise<rule>(args.dtype); \
    break;
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      return;
  }
  launch(kernel, "launch of optimizer_step_8bit_blockwise_kernel", args, tensors, kResident,
         stream);
}

}  // namespace bnb::gpu
