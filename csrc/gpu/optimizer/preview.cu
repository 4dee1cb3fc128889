// What a step needs to know of whole tensors beforehand: the preview of an update, and the norms of
// gradients. One pass over the tiles of the list leaves partial results, a second, small one adds
// them up per tensor. Both in a fixed order, so that results are equal run to run.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/optim/clipping.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/list.cuh"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFinishThreads = 128;
constexpr int kResident = 2;  // blocks of threads per multiprocessor
constexpr int kPack = 4;

// Partial result of a tile, or their total: kPreviewNumbers numbers.
struct Preview {
  double param_squares;
  double update_squares;
  float most[2];  // absmax of the new states
  float active;   // 1 if an element is not skipped, else 0

  __device__ __forceinline__ static Preview none() { return {0.0, 0.0, {0.0f, 0.0f}, 0.0f}; }

  __device__ __forceinline__ void add(const Preview& other) {
    param_squares += other.param_squares;
    update_squares += other.update_squares;
    for (int k = 0; k < 2; ++k) most[k] = fmaxf(most[k], other.most[k]);
    active = fmaxf(active, other.active);
  }

  __device__ __forceinline__ Preview from_lane(int mask) const {
    return {shuffle_xor(param_squares, mask),
            shuffle_xor(update_squares, mask),
            {shuffle_xor(most[0], mask), shuffle_xor(most[1], mask)},
            shuffle_xor(active, mask)};
  }
};

struct Squares {
  double sum;
  __device__ __forceinline__ static Squares none() { return {0.0}; }
  __device__ __forceinline__ void add(const Squares& other) { sum += other.sum; }
  __device__ __forceinline__ Squares from_lane(int mask) const { return {shuffle_xor(sum, mask)}; }
};

// Adds up the values of all threads; the first thread gets the total. `scratch`: one per warp.
template <class T>
__device__ __forceinline__ T block_total(T value, T* scratch) {
  for (int mask = 1; mask < kWarp; mask *= 2) value.add(value.from_lane(mask));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncthreads();  // the last total has been read
  if (threadIdx.x % kWarp == 0) scratch[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) value.add(scratch[w]);
  }
  return value;
}

// The codes of the states in shared memory; empty where states are floats.
template <class R, bool kCodes>
struct Tables {
  Code8<true> codes[state_tensors(R::kStates)];
  EncodeTables<true> unused;

  __device__ __forceinline__ void fill(const OptimizerStep& args) {
#pragma unroll
    for (int k = 0; k < state_tensors(R::kStates); ++k) codes[k].fill(args.qmap[k], unused);
  }
  __device__ __forceinline__ float level(int k, uint8_t code) const {
    return codes[tensor_of_state(R::kStates, k)].levels[code];
  }
};

template <class R>
struct Tables<R, false> {
  __device__ __forceinline__ void fill(const OptimizerStep&) {}
};

template <class R, class T, bool kCodes>
__global__ void BNB_LAUNCH_BOUNDS(kThreads, kResident)
    optimizer_preview_kernel(const BNB_GRID_CONSTANT StepList list, bool blockwise,
                             float* partials) {
  __shared__ Tables<R, kCodes> tables;
  __shared__ Step<R> shared_step;
  __shared__ Preview scratch[kWarps];
  const OptimizerStep& args = list.header.args;
  tables.fill(args);
  if (threadIdx.x == 0) shared_step = Step<R>::make_preview(args.hyper, *args.step + 1);
  __syncthreads();
  for (uint32_t tile = blockIdx.x; tile < list.header.tiles; tile += gridDim.x) {
    const int e = list.find_entry(tile);
    const auto& entry = list.entries[e];
    const OptimizerTensor& tensor = entry.tensor;
    const int index = list.header.tensors_before + e;
    const Step<R> step =
        shared_step.scaled(args.gnorm_scales != nullptr ? args.gnorm_scales[index] : 1.0f, 1.0f);
    const T* const param = static_cast<const T*>(tensor.param);
    const T* const grad = static_cast<const T*>(tensor.grad);
    const int64_t begin = int64_t{tile - entry.first_tile} * kPreviewTile;
    const int64_t end = min(begin + kPreviewTile, tensor.n);
    Preview sum = Preview::none();
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      const bool packs = entry.packs != 0;
      const Pack<T, kPack> g = load_pack<T, kPack>(grad + i, tensor.n - i, packs);
      const Pack<T, kPack> p = load_pack<T, kPack>(param + i, tensor.n - i, packs);
      float old[R::kStates][kPack];
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) {
        if constexpr (kCodes) {
          const auto* state =
              static_cast<const uint8_t*>(state_pointer(tensor, R::kStates, k, 1)) + i;
          const Pack<uint8_t, kPack> codes = load_pack<uint8_t, kPack>(state, tensor.n - i, packs);
          // A pack lies within one block.
          const float scale = blockwise ? absmax_pointer(tensor, R::kStates, k)[i / kOptimizerBlock]
                                        : args.max[tensor_of_state(R::kStates, k)][index];
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            old[k][j] = __fmul_rn(tables.level(k, codes.values[j]), scale);
          }
        } else {
          const auto* state =
              static_cast<const float*>(state_pointer(tensor, R::kStates, k, sizeof(float))) + i;
          const Pack<float, kPack> values = load_pack<float, kPack>(state, tensor.n - i, packs);
#pragma unroll
          for (int j = 0; j < kPack; ++j) old[k][j] = values.values[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (i + j >= end) break;
        const float gradient = __fmul_rn(widen(g.values[j]), step.gnorm_scale);
        const float parameter = widen(p.values[j]);
        sum.param_squares += static_cast<double>(parameter) * parameter;
        Scalar s[R::kStates];
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) s[k] = Scalar(old[k][j]);
        float update = step.preview(Scalar(gradient), Scalar(parameter), s).v;
        const bool skipped = step.skip_zeros && gradient == 0.0f;
        // With codes, a gradient that is not finite moves nothing and clears its element's state.
        const bool useful = !kCodes || is_finite(gradient);
        if (skipped || !useful) update = 0.0f;
        if (!skipped) sum.active = 1.0f;
        sum.update_squares += static_cast<double>(update) * update;
        if constexpr (kCodes && R::kStates <= 2) {
#pragma unroll
          for (int k = 0; k < R::kStates; ++k) {
            const float state = skipped ? old[k][j] : (useful ? finite_state(s[k].v) : 0.0f);
            sum.most[k] = fmaxf(sum.most[k], fabsf(state));
          }
        }
      }
    }
    const Preview total = block_total(sum, scratch);
    if (threadIdx.x == 0) {
      float* partial = partials + (list.header.tiles_before + tile) * kPreviewNumbers;
      partial[0] = static_cast<float>(total.param_squares);
      partial[1] = static_cast<float>(total.update_squares);
      partial[2] = total.most[0];
      partial[3] = total.most[1];
      partial[4] = total.active;
    }
  }
}

// One block of threads per tensor.
__global__ void __launch_bounds__(kFinishThreads)
    finish_preview_kernel(const BNB_GRID_CONSTANT StepList list, const float* partials) {
  __shared__ Preview scratch[kFinishThreads / kWarp];
  const OptimizerStep& args = list.header.args;
  const int e = static_cast<int>(blockIdx.x);
  const int index = list.header.tensors_before + e;
  Preview sum = Preview::none();
  for (uint32_t tile = list.entries[e].first_tile + threadIdx.x; tile < list.end_tile(e);
       tile += blockDim.x) {
    const float* partial = partials + (list.header.tiles_before + tile) * kPreviewNumbers;
    sum.add({partial[0], partial[1], {partial[2], partial[3]}, partial[4]});
  }
  const Preview total = block_total(sum, scratch);
  if (threadIdx.x != 0) return;
  if (args.param_squares != nullptr) {
    args.param_squares[index] = static_cast<float>(total.param_squares);
  }
  if (args.unorm != nullptr) args.unorm[index] = static_cast<float>(total.update_squares);
  if (args.new_update_scales != nullptr) {
    args.new_update_scales[index] =
        bounded_update_scale(total.param_squares, total.update_squares, args.max_unorm);
  }
  for (int k = 0; k < 2; ++k) {
    if (args.new_max[k] == nullptr) continue;
    // A tensor that stands still as a whole keeps its scale, and with it every code.
    args.new_max[k][index] = total.active != 0.0f ? total.most[k] : args.max[k][index];
  }
}

using PreviewKernel = void (*)(const StepList, bool, float*);

template <class R, class T>
PreviewKernel choose(bool codes) {
  return codes ? optimizer_preview_kernel<R, T, true> : optimizer_preview_kernel<R, T, false>;
}

// ---- Norms of gradients -------------------------------------------------------------------------

struct ClippingArgs {
  PercentileClipping call;
  int count;  // of the whole list
};

using GradientList = List<GradientTensor, ClippingArgs>;

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_squares_kernel(const BNB_GRID_CONSTANT GradientList list, float* partials) {
  __shared__ Squares scratch[kWarps];
  for (uint32_t tile = blockIdx.x; tile < list.header.tiles; tile += gridDim.x) {
    const auto& entry = list.entries[list.find_entry(tile)];
    const T* const grad = static_cast<const T*>(entry.tensor.grad);
    const int64_t n = entry.tensor.n;
    const int64_t begin = int64_t{tile - entry.first_tile} * kPreviewTile;
    const int64_t end = min(begin + kPreviewTile, n);
    Squares sum = Squares::none();
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      const Pack<T, kPack> g = load_pack<T, kPack>(grad + i, n - i, entry.packs != 0);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const double value = widen(g.values[j]);
        sum.sum += value * value;
      }
    }
    const Squares total = block_total(sum, scratch);
    if (threadIdx.x == 0) {
      partials[list.header.tiles_before + tile] = static_cast<float>(total.sum);
    }
  }
}

// One block of threads per gradient.
__global__ void __launch_bounds__(kFinishThreads)
    percentile_clipping_kernel(const BNB_GRID_CONSTANT GradientList list, const float* partials) {
  static_assert(kNormHistory <= kFinishThreads);
  __shared__ Squares scratch[kFinishThreads / kWarp];
  __shared__ float shared_squares;
  __shared__ float history[kNormHistory];
  const PercentileClipping& args = list.header.args.call;
  const int e = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  float* const gnorm_vec = list.entries[e].tensor.gnorm_vec;
  Squares sum = Squares::none();
  for (uint32_t tile = list.entries[e].first_tile + threadIdx.x; tile < list.end_tile(e);
       tile += blockDim.x) {
    sum.sum += partials[list.header.tiles_before + tile];
  }
  const Squares total = block_total(sum, scratch);
  // Rounded as the history holds it, so that a norm equals its own entry.
  if (thread == 0) shared_squares = static_cast<float>(total.sum);
  __syncthreads();
  const float squares = shared_squares;
  const bool finite = is_finite(squares);
  const int64_t number = *args.step + 1;
  float own = thread < kNormHistory ? gnorm_vec[thread] : 0.0f;
  const bool empty = block_all(own == 0.0f);
  if (finite && (number == 1 || empty || number % kNormHistory == thread)) own = squares;
  if (thread < kNormHistory) {
    gnorm_vec[thread] = own;
    history[thread] = own;
  }
  __syncthreads();
  if (thread >= kNormHistory) return;
  // The thread whose entry stands at the percentile when all are sorted, as integers, whose order
  // has a place for NaN.
  int rank = 0;
  for (int i = 0; i < kNormHistory; ++i) {
    const uint32_t other = float_bits(history[i]);
    rank += other < float_bits(own) || (other == float_bits(own) && i < thread) ? 1 : 0;
  }
  if (rank != args.percentile) return;
  const int count = list.header.args.count;
  const int index = list.header.tensors_before + e;
  const float norm = sqrtf(squares);
  const float clip = sqrtf(own);
  args.out[index] = norm;
  args.out[count + index] = clip;
  args.out[2 * count + index] = finite ? percentile_scale(norm, clip) : 1.0f;
}

using SquaresKernel = void (*)(const GradientList, float*);

int blocks_for(uint32_t tiles, int64_t most) {
  return static_cast<int>(std::min<int64_t>(tiles, most));
}

}  // namespace

void optimizer_preview(const OptimizerStep& args, StateFormat format,
                       std::span<const OptimizerTensor> tensors, float* partials, Stream stream) {
  const bool codes = format != StateFormat::kFloat32;
  const PreviewKernel kernel = choose_by_rule<PreviewKernel>(args.rule, [&]<class R>() {
    switch (args.dtype) {
      case DType::kFloat16:
        return choose<R, Half>(codes);
      case DType::kBFloat16:
        return choose<R, BFloat16>(codes);
      default:
        return choose<R, float>(codes);
    }
  });
  const int states = kRules[static_cast<int>(args.rule)].states;
  const int value_size = args.dtype == DType::kFloat32 ? 4 : 2;
  const int state_size = codes ? 1 : 4;
  const auto packs = [&](const OptimizerTensor& t) {
    bool aligned =
        is_aligned(t.param, kPack * value_size) && is_aligned(t.grad, kPack * value_size);
    for (int k = 0; k < states; ++k) {
      aligned = aligned && is_aligned(state_pointer(t, states, k, state_size), kPack * state_size);
    }
    return aligned;
  };
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  for_each_launch<StepList>(args, tensors, kPreviewTile, packs, [&](const StepList& list) {
    if (const int blocks = blocks_for(list.header.tiles, most_blocks); blocks > 0) {
      kernel<<<blocks, kThreads, 0, handle>>>(list, format == StateFormat::kBlockwise8bit,
                                              partials);
      BNB_LAUNCH_CHECK("optimizer_preview");
    }
    finish_preview_kernel<<<list.header.count, kFinishThreads, 0, handle>>>(list, partials);
    BNB_LAUNCH_CHECK("finish_preview");
  });
}

void percentile_clipping(const PercentileClipping& args, std::span<const GradientTensor> tensors,
                         float* partials, Stream stream) {
  SquaresKernel kernel = gradient_squares_kernel<float>;
  if (args.dtype == DType::kFloat16) kernel = gradient_squares_kernel<Half>;
  if (args.dtype == DType::kBFloat16) kernel = gradient_squares_kernel<BFloat16>;
  const int size = args.dtype == DType::kFloat32 ? 4 : 2;
  const auto packs = [&](const GradientTensor& t) { return is_aligned(t.grad, kPack * size); };
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const ClippingArgs call{args, static_cast<int>(tensors.size())};
  for_each_launch<GradientList>(call, tensors, kPreviewTile, packs, [&](const GradientList& list) {
    if (const int blocks = blocks_for(list.header.tiles, most_blocks); blocks > 0) {
      kernel<<<blocks, kThreads, 0, handle>>>(list, partials);
      BNB_LAUNCH_CHECK("gradient_squares");
    }
    percentile_clipping_kernel<<<list.header.count, kFinishThreads, 0, handle>>>(list, partials);
    BNB_LAUNCH_CHECK("percentile_clipping");
  });
}

}  // namespace bnb::gpu
