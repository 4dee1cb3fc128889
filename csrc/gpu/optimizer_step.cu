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
#include "gpu/device/scalar.cuh"
#include "gpu/device/vector_io.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileBlocks = 32;  // quantization blocks of a tile: 8192 elements
constexpr int64_t kTile = int64_t{kTileBlocks} * kOptimizerBlock;
constexpr int kLaneElements = kOptimizerBlock / kWarp;
// Blocks of threads per multiprocessor, and the registers they leave each other.
constexpr int kResident = 2;

constexpr uint32_t kInfinityBits = 0x7f800000u;

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

// Turns the states of a lane into codes, after reducing their absmax over the warp, and stores the
// absmax. `largest`: the lane's largest magnitude, NaN if it holds NaN.
template <int kCount>
__device__ __forceinline__ void encode_block(const Code8<true>& code,
                                             const EncodeTables<true>& tables,
                                             float (&states)[kCount], float largest, float* absmax,
                                             uint32_t (&words)[kCount / 4]) {
  uint32_t most = warp_max(magnitude_bits(largest));
  if (most >= kInfinityBits) {
    most = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      states[e] = finite_state(states[e]);
      most = max(most, magnitude_bits(states[e]));
    }
    most = warp_max(most);
  }
  const float scale = absmax_from_bits(most);
  if (threadIdx.x % kWarp == 0) *absmax = scale;
  code.encode(tables, states, scale, words);
}

// What a lane reads of a full block whose pointers allow packs.
template <class R, class T>
struct FullBlock {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kPacks = kLaneElements / kPack;
  static constexpr int kStride = kWarp * kPack;

  Words<T, kPack> grad[kPacks];
  Words<T, kPack> param[kPacks];
  uint32_t codes[R::kStates][kLaneElements / 4];
  float scale[R::kStates];

  __device__ __forceinline__ static int64_t begin(int64_t index) {
    return index * kOptimizerBlock + static_cast<int>(threadIdx.x) % kWarp * kPack;
  }

  __device__ __forceinline__ void load(const OptimizerTensor& tensor, int64_t index) {
    const int64_t at = begin(index);
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) scale[k] = tensor.absmax[k][index];
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      grad[v] =
          load_aligned<Words<T, kPack>>(static_cast<const T*>(tensor.grad) + at + v * kStride);
      param[v] =
          load_aligned<Words<T, kPack>>(static_cast<const T*>(tensor.param) + at + v * kStride);
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        const auto* state = static_cast<const uint8_t*>(tensor.state[k]) + at + v * kStride;
        const auto words = load_aligned<Words<uint8_t, kPack>>(state);
#pragma unroll
        for (int w = 0; w < kPack / 4; ++w) codes[k][v * (kPack / 4) + w] = words.words[w];
      }
    }
  }
};

// The step of a full block. Returns false, having done nothing, when a gradient is not finite.
template <class R, class T>
__device__ __forceinline__ bool step_full_block(
    const OptimizerTensor& tensor,
    const Code8<true>* code,  // [R::kStates], shared memory
    const EncodeTables<true>& tables, const Step<R>& step, int64_t index) {
  constexpr int kPack = FullBlock<R, T>::kPack;
  constexpr int kPacks = FullBlock<R, T>::kPacks;
  constexpr int kStride = FullBlock<R, T>::kStride;
  FullBlock<R, T> block;
  block.load(tensor, index);
  const int64_t begin = FullBlock<R, T>::begin(index);
  T* const param = static_cast<T*>(tensor.param) + begin;

  float gradient[kLaneElements];
  float largest_gradient = 0.0f;
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) {
    gradient[e] = __fmul_rn(block.grad[e / kPack].get(e % kPack), step.gnorm_scale);
    largest_gradient = absmax_step(largest_gradient, gradient[e]);
  }
  if (!warp_all(largest_gradient <= kFloatMax)) return false;

  float states[R::kStates][kLaneElements];
  float largest[R::kStates] = {};
#pragma unroll
  for (int v = 0; v < kPacks; ++v) {
    float updated[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int e = v * kPack + j;
      Scalar s[R::kStates];
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        s[k] = Scalar(__fmul_rn(code[k].level(block.codes[k], e), block.scale[k]));
      }
      updated[j] = step.advance(Scalar(gradient[e]), Scalar(block.param[v].get(j)), s).v;
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        states[k][e] = s[k].v;
        largest[k] = absmax_step(largest[k], s[k].v);
      }
    }
    block.param[v].set(updated);
    store_aligned(param + v * kStride, block.param[v]);
  }
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    encode_block(code[k], tables, states[k], largest[k], tensor.absmax[k] + index, block.codes[k]);
    uint8_t* state = static_cast<uint8_t*>(tensor.state[k]) + begin;
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      Words<uint8_t, kPack> words;
#pragma unroll
      for (int w = 0; w < kPack / 4; ++w) words.words[w] = block.codes[k][v * (kPack / 4) + w];
      store_aligned(state + v * kStride, words);
    }
  }
  return true;
}

// The step of any block: incomplete, misaligned, with gradients that are not finite or with zeros
// to skip. Element by element.
template <class R, class T>
__device__ __noinline__ void step_any_block(const OptimizerTensor& tensor,
                                            const Code8<true>* code,  // [R::kStates], shared memory
                                            const EncodeTables<true>& tables, const Step<R>& step,
                                            int64_t index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t begin = index * kOptimizerBlock + lane * kLaneElements;
  const int64_t left = tensor.n - begin;
  const int count = static_cast<int>(left < kLaneElements ? (left > 0 ? left : 0) : kLaneElements);
  T* const param = static_cast<T*>(tensor.param) + begin;
  const T* const grad = static_cast<const T*>(tensor.grad) + begin;

  float scale[R::kStates];
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) scale[k] = tensor.absmax[k][index];
  float states[R::kStates][kLaneElements] = {};
  float largest[R::kStates] = {};
  bool idle = true;  // every element is skipped
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) {
    if (e >= count) break;
    const float gradient = __fmul_rn(widen(grad[e]), step.gnorm_scale);
    Scalar s[R::kStates];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      const uint8_t old = static_cast<const uint8_t*>(tensor.state[k])[begin + e];
      states[k][e] = __fmul_rn(code[k].levels[old], scale[k]);
      s[k] = Scalar(states[k][e]);
    }
    const float updated = step.advance(Scalar(gradient), Scalar(widen(param[e])), s).v;
    // A gradient that is not finite has no use: its element loses the state and keeps the
    // parameter.
    const bool useful = is_finite(gradient);
    if (!(step.skip_zeros && gradient == 0.0f)) {
      idle = false;
      if (useful) param[e] = narrow<T>(updated);
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) states[k][e] = useful ? s[k].v : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) largest[k] = absmax_step(largest[k], states[k][e]);
  }
  // Codes that mean the same numbers again would still lose a little each time.
  if (warp_all(idle)) return;
#pragma unroll
  for (int k = 0; k < R::kStates; ++k) {
    uint32_t words[kLaneElements / 4];
    encode_block(code[k], tables, states[k], largest[k], tensor.absmax[k] + index, words);
    uint8_t* state = static_cast<uint8_t*>(tensor.state[k]) + begin;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      if (e < count) state[e] = static_cast<uint8_t>(words[e / 4] >> (8 * (e % 4)));
    }
  }
}

template <class R, class T>
__global__ void BNB_LAUNCH_BOUNDS(kThreads, kResident)
    optimizer_step_8bit_blockwise_kernel(const BNB_GRID_CONSTANT TensorList list) {
  __shared__ Code8<true> codes[R::kStates];
  __shared__ EncodeTables<true> tables;
  __shared__ Step<R> shared_step;
  for (int k = 0; k < R::kStates; ++k) codes[k].fill(list.args.qmap[k], tables);
  if (threadIdx.x == 0) {
    shared_step = Step<R>::make(list.args.hyper, *list.args.step + 1, list.args.lr);
  }
  __syncthreads();
  const Step<R> step = shared_step;

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t tile = blockIdx.x; tile < list.args.tiles; tile += gridDim.x) {
    const Entry& entry = list.entries[find_entry(list, tile)];
    const OptimizerTensor tensor = entry.tensor;
    constexpr int kPack = kPackSize<T>;
    bool packs = is_aligned(tensor.param, 16) && is_aligned(tensor.grad, 16) && !step.skip_zeros;
    for (int k = 0; k < R::kStates; ++k) packs = packs && is_aligned(tensor.state[k], kPack);
    const int64_t first = (tile - entry.first_tile) * kTileBlocks;
    const int64_t blocks = (tensor.n + kOptimizerBlock - 1) / kOptimizerBlock;
    const int64_t full = packs ? tensor.n / kOptimizerBlock : 0;
    const int64_t end = min(first + kTileBlocks, blocks);
    for (int64_t index = first + warp; index < end; index += kWarps) {
      if (index < full && step_full_block<R, T>(tensor, codes, tables, step, index)) continue;
      step_any_block<R, T>(entry.tensor, codes, tables, shared_step, index);
    }
  }
}

template <class R, class T>
__global__ void __launch_bounds__(kThreads)
    optimizer_step_32bit_kernel(const BNB_GRID_CONSTANT TensorList list) {
  constexpr int kPack = 4;  // 16 bytes of state
  __shared__ Step<R> shared_step;
  if (threadIdx.x == 0) {
    shared_step = Step<R>::make(list.args.hyper, *list.args.step + 1, list.args.lr);
  }
  __syncthreads();
  const Step<R> step = shared_step;

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
        const float gradient = __fmul_rn(widen(g.values[j]), step.gnorm_scale);
        Scalar states[R::kStates];
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) states[k] = Scalar(s[k].values[j]);
        const Scalar updated = step.advance(Scalar(gradient), Scalar(widen(p.values[j])), states);
        if (step.skip_zeros && gradient == 0.0f) continue;
        p.values[j] = narrow<T>(updated.v);
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) s[k].values[j] = states[k].v;
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
void launch(Kernel kernel, const OptimizerStep& step, std::span<const OptimizerTensor> tensors,
            int resident, Stream stream) {
  TensorList list;
  list.args = {step.hyper, step.step, step.lr, {step.qmap[0], step.qmap[1]}, 0, 0};
  const int most_blocks = multiprocessors() * resident;
  const auto flush = [&] {
    if (list.args.count == 0) return;
    const int blocks = static_cast<int>(std::min<int64_t>(list.args.tiles, most_blocks));
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(list);
    BNB_LAUNCH_CHECK("optimizer step kernel");
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
  launch(kernel, args, tensors, 2 * kResident, stream);
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
  launch(kernel, args, tensors, kResident, stream);
}

}  // namespace bnb::gpu
