// What a step needs to know of whole tensors beforehand: the preview of an update, and the norms of
// gradients. Blocks of threads leave partial results, one per tile; the last block at a tensor adds
// up those of the tensor, in a fixed order, so that results are equal run to run.
// SPDX-License-Identifier: MIT
#include "bitsandbytes/optim/clipping.h"
#include "gpu/device/code8.cuh"
#include "gpu/device/scalar.cuh"
#include "gpu/optimizer/list.cuh"

namespace bnb::gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 2;  // blocks of threads per multiprocessor
constexpr int kGradientResident = 4;

// Sums over many elements are taken in double; a thread's own 16 elements of a tile in float.

// What a step is to know of a tensor.
struct Preview {
  static constexpr int kNumbers = kPreviewNumbers;
  double squares[2];  // of the parameter, of the update
  // Of tensors with one scale: absmax of the new states, and 1 if an element is not skipped, else
  // 0.
  float most[2];
  float active;

  __device__ __forceinline__ void add(const Preview& other) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      squares[k] += other.squares[k];
      most[k] = fmaxf(most[k], other.most[k]);
    }
    active = fmaxf(active, other.active);
  }
  __device__ __forceinline__ Preview from_lane(int mask) const {
    return {{shuffle_xor(squares[0], mask), shuffle_xor(squares[1], mask)},
            {shuffle_xor(most[0], mask), shuffle_xor(most[1], mask)},
            shuffle_xor(active, mask)};
  }
  __device__ __forceinline__ void store(float* p) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      p[k] = static_cast<float>(squares[k]);
      p[2 + k] = most[k];
    }
    p[4] = active;
  }
  __device__ __forceinline__ static Preview load(const float* p) {
    return {{p[0], p[1]}, {p[2], p[3]}, p[4]};
  }
};

// The sum of squares of a gradient.
struct Squares {
  static constexpr int kNumbers = 1;
  double value;

  __device__ __forceinline__ void add(const Squares& other) { value += other.value; }
  __device__ __forceinline__ Squares from_lane(int mask) const {
    return {shuffle_xor(value, mask)};
  }
  __device__ __forceinline__ void store(float* p) const { *p = static_cast<float>(value); }
  __device__ __forceinline__ static Squares load(const float* p) { return {*p}; }
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

// The levels of the states in shared memory; empty where states are floats.
template <class R, bool kCodes>
struct Levels {
  float values[state_tensors(R::kStates)][kCodeLevels];

  // Called by all threads of the block, which must be synchronised before levels are used.
  __device__ __forceinline__ void fill(const OptimizerStep& args) {
#pragma unroll
    for (int k = 0; k < state_tensors(R::kStates); ++k) {
      for (int i = threadIdx.x; i < kCodeLevels; i += blockDim.x) values[k][i] = args.qmap[k][i];
    }
  }
};

template <class R>
struct Levels<R, false> {
  __device__ __forceinline__ void fill(const OptimizerStep&) {}
};

// One tensor as the preview reads it.
template <class R, class T, StateFormat kFormat>
struct Source {
  static constexpr bool kCodes = kFormat != StateFormat::kFloat32;
  static constexpr int kPack = kPackSize<T>;

  const OptimizerTensor& tensor;
  const Levels<R, kCodes>& levels;
  float scale[R::kStates];  // of the whole tensor; unused unless kTensor8bit

  // State k of the kPack elements from i on, of which `left` are there. `kWhole`: all are, and
  // packs are aligned.
  template <bool kWhole>
  __device__ __forceinline__ void load_state(int k, int64_t i, int64_t left,
                                             float (&values)[kPack]) const {
    if constexpr (kCodes) {
      const auto* codes = static_cast<const uint8_t*>(state_pointer(tensor, R::kStates, k, 1)) + i;
      // A pack lies within one block.
      const float factor = kFormat == StateFormat::kTensor8bit
                               ? scale[k]
                               : absmax_pointer(tensor, R::kStates, k)[i / kOptimizerBlock];
      const float* level = levels.values[tensor_of_state(R::kStates, k)];
      if constexpr (kWhole) {
        const auto words = load_aligned<Words<uint8_t, kPack>>(codes);
#pragma unroll
        for (int j = 0; j < kPack; ++j)
          values[j] = __fmul_rn(level_of(level, words.words, j), factor);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          values[j] = j < left ? __fmul_rn(level[codes[j]], factor) : 0.0f;
        }
      }
    } else {
      constexpr int kChunk = 4;  // 16 bytes
      const auto* p =
          static_cast<const float*>(state_pointer(tensor, R::kStates, k, sizeof(float))) + i;
      if constexpr (kWhole) {
#pragma unroll
        for (int v = 0; v < kPack / kChunk; ++v) {
          const auto words = load_aligned<Words<float, kChunk>>(p + v * kChunk);
#pragma unroll
          for (int j = 0; j < kChunk; ++j) values[v * kChunk + j] = words.get(j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) values[j] = j < left ? p[j] : 0.0f;
      }
    }
  }
};

template <bool kWhole, class T>
__device__ __forceinline__ Words<T, kPackSize<T>> load_values(const void* p, int64_t i,
                                                              int64_t left) {
  const T* values = static_cast<const T*>(p) + i;
  if constexpr (kWhole) return load_aligned<Words<T, kPackSize<T>>>(values);
  return load_words<T, kPackSize<T>>(values, left);
}

// Adds this thread's elements of the tile [begin, begin + kPreviewTile) of a tensor.
template <bool kWhole, class R, class T, StateFormat kFormat>
__device__ __forceinline__ void preview_tile(const Source<R, T, kFormat>& source,
                                             const Step<R>& step, int64_t begin, Preview& sum) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kTurn = kThreads * kPack;
  constexpr int kTurns = kPreviewTile / kTurn;
  // With three states at a time, registers run out. (Not every compiler reads pragmas.)
  [[maybe_unused]] constexpr int kTogether = R::kStates < 3 ? kTurns : 1;
  constexpr bool kCodes = kFormat != StateFormat::kFloat32;
  float param_squares = 0.0f;
  float update_squares = 0.0f;
#pragma unroll kTogether
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t i = begin + turn * kTurn + threadIdx.x * kPack;
    const int64_t left = source.tensor.n - i;
    if (!kWhole && left <= 0) break;
    const auto grad = load_values<kWhole, T>(source.tensor.grad, i, left);
    const auto param = load_values<kWhole, T>(source.tensor.param, i, left);
    float old[R::kStates][kPack];
#pragma unroll
    for (int k = 0; k < R::kStates; ++k) {
      source.template load_state<kWhole>(k, i, left, old[k]);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (!kWhole && j >= left) break;
      const float gradient = __fmul_rn(grad.get(j), step.gnorm_scale);
      const float parameter = param.get(j);
      param_squares = __fmaf_rn(parameter, parameter, param_squares);
      Scalar s[R::kStates];
#pragma unroll
      for (int k = 0; k < R::kStates; ++k) s[k] = Scalar(old[k][j]);
      float update = step.preview(Scalar(gradient), Scalar(parameter), s).v;
      const bool skipped = step.skip_zeros && gradient == 0.0f;
      // With codes, a gradient that is not finite moves nothing and clears its element's state.
      const bool useful = !kCodes || is_finite(gradient);
      if (skipped || !useful) update = 0.0f;
      update_squares = __fmaf_rn(update, update, update_squares);
      if constexpr (kFormat == StateFormat::kTensor8bit) {
        if (!skipped) sum.active = 1.0f;
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) {
          const float state = skipped ? old[k][j] : (useful ? finite_state(s[k].v) : 0.0f);
          sum.most[k] = fmaxf(sum.most[k], fabsf(state));
        }
      }
    }
  }
  sum.squares[0] += param_squares;
  sum.squares[1] += update_squares;
}

__device__ __forceinline__ void write_preview(const OptimizerStep& args, int index,
                                              const Preview& found) {
  if (args.param_squares != nullptr) {
    args.param_squares[index] = static_cast<float>(found.squares[0]);
  }
  if (args.unorm != nullptr) args.unorm[index] = static_cast<float>(found.squares[1]);
  if (args.new_update_scales != nullptr) {
    args.new_update_scales[index] =
        bounded_update_scale(found.squares[0], found.squares[1], args.max_unorm);
  }
  for (int k = 0; k < 2; ++k) {
    if (args.new_max[k] == nullptr) continue;
    // A tensor that stands still as a whole keeps its scale, and with it every code.
    args.new_max[k][index] = found.active != 0.0f ? found.most[k] : args.max[k][index];
  }
}

// Goes through the tiles of a list, of which every block of threads takes a stretch: barriers are
// few then, which in tiles taken in turn cost a quarter of the time. sum_of(e, begin, end) is what
// this thread finds in some tiles of entry e; write(e, sum), called by all threads, gets the sum of
// a whole entry in the first one. Where an entry lies in several stretches, each leaves its sum in
// `partials`, where its tiles of the entry begin, and the last block to do so adds them up.
template <class Sum, class L, class SumOf, class Write>
__device__ __forceinline__ void over_tensors(const L& list, const Entries<L>& entries,
                                             uint32_t* tickets, Sum* scratch, float* partials,
                                             SumOf sum_of, Write write) {
  const auto stretch = static_cast<uint32_t>(ceil_div(list.header.tiles, gridDim.x));
  const uint32_t end = min(list.header.tiles, (blockIdx.x + 1) * stretch);
  float* const own = partials + list.header.tiles_before * Sum::kNumbers;
  for (uint32_t tile = blockIdx.x * stretch; tile < end;) {
    const int e = entries.find(tile);
    const uint32_t first = entries[e].first_tile;
    const uint32_t behind = entries.end_tile(e);
    const uint32_t begin = tile;
    tile = min(end, behind);
    Sum sum = block_total(sum_of(e, begin, tile), scratch);
    if (tile - begin < behind - first) {
      bool complete = true;
      if (threadIdx.x == 0) {
        sum.store(own + int64_t{begin} * Sum::kNumbers);
        uint32_t* const ticket = &tickets[1 + list.header.tensors_before + e];
        complete = completes(ticket, tile - begin, behind - first);
      }
      if (!block_all(complete)) continue;
      sum = Sum{};
      const auto stretches = static_cast<uint32_t>(ceil_div(behind, stretch));
      for (uint32_t s = first / stretch + threadIdx.x; s < stretches; s += blockDim.x) {
        sum.add(Sum::load(own + int64_t{max(first, s * stretch)} * Sum::kNumbers));
      }
      sum = block_total(sum, scratch);
    }
    write(e, sum);
  }
}

template <class R, class T, StateFormat kFormat>
__global__ void BNB_LAUNCH_BOUNDS(kThreads, kResident)
    optimizer_preview_kernel(const BNB_GRID_CONSTANT StepList list, float* partials) {
  constexpr bool kCodes = kFormat != StateFormat::kFloat32;
  BNB_DYNAMIC_SHARED(storage);
  __shared__ Levels<R, kCodes> levels;
  __shared__ Step<R> shared_step;
  __shared__ Preview scratch[kWarps];
  const OptimizerStep& args = list.header.args;
  const Entries<StepList> entries(list, storage);
  levels.fill(args);
  if (threadIdx.x == 0) shared_step = Step<R>::make_preview(args.hyper, *args.step + 1);
  __syncthreads();
  const auto sum_of = [&](int e, uint32_t first, uint32_t last) {
    Preview sum{};
    for (uint32_t tile = first; tile < last; ++tile) {
      // Read again for every tile: in between, registers are short.
      const auto& entry = *hide_origin(&entries[e]);
      const int index = list.header.tensors_before + e;
      const Step<R> step =
          hide_origin(&shared_step)
              ->scaled(args.gnorm_scales != nullptr ? args.gnorm_scales[index] : 1.0f, 1.0f);
      Source<R, T, kFormat> source{entry.tensor, levels, {}};
      if constexpr (kFormat == StateFormat::kTensor8bit) {
#pragma unroll
        for (int k = 0; k < R::kStates; ++k) {
          source.scale[k] = args.max[tensor_of_state(R::kStates, k)][index];
        }
      }
      const int64_t begin = int64_t{tile - entry.first_tile} * kPreviewTile;
      if (entry.packs != 0 && begin + kPreviewTile <= entry.tensor.n) {
        preview_tile<true>(source, step, begin, sum);
      } else {
        preview_tile<false>(source, step, begin, sum);
      }
    }
    return sum;
  };
  const auto write = [&](int e, const Preview& sum) {
    if (threadIdx.x == 0) write_preview(args, list.header.tensors_before + e, sum);
  };
  over_tensors(list, entries, args.tickets, scratch, partials, sum_of, write);
}

using PreviewKernel = void (*)(const StepList, float*);

template <class R, class T>
PreviewKernel choose(StateFormat format) {
  switch (format) {
    case StateFormat::kFloat32:
      return optimizer_preview_kernel<R, T, StateFormat::kFloat32>;
    case StateFormat::kBlockwise8bit:
      return optimizer_preview_kernel<R, T, StateFormat::kBlockwise8bit>;
    case StateFormat::kTensor8bit:
      if constexpr (R::kStates <= 2) {
        return optimizer_preview_kernel<R, T, StateFormat::kTensor8bit>;
      }
  }
  return nullptr;  // the op has refused it
}

// ---- Norms of gradients -------------------------------------------------------------------------

struct ClippingArgs {
  PercentileClipping call;
  int count;  // of the whole list
};

using GradientList = List<GradientTensor, ClippingArgs>;

// The sum of squares of this thread's elements of the tile that begins at `begin`.
template <bool kWhole, class T>
__device__ __forceinline__ float square_tile(const GradientTensor& tensor, int64_t begin) {
  constexpr int kPack = kPackSize<T>;
  constexpr int kTurn = kThreads * kPack;
  float sum = 0.0f;
#pragma unroll
  for (int turn = 0; turn < kPreviewTile / kTurn; ++turn) {
    const int64_t i = begin + turn * kTurn + threadIdx.x * kPack;
    const auto grad = load_values<kWhole, T>(tensor.grad, i, tensor.n - i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum = __fmaf_rn(grad.get(j), grad.get(j), sum);
  }
  return sum;
}

// Enters the sum of squares of a gradient into its history, and finds the factor. Called by all
// threads; `squares` is that of the first one.
__device__ __forceinline__ void clip_gradient(const ClippingArgs& clipping, float* gnorm_vec,
                                              int index, double squares_of_first) {
  __shared__ float shared_squares;
  __shared__ float history[kNormHistory];
  static_assert(kNormHistory <= kThreads);
  const PercentileClipping& args = clipping.call;
  const int thread = static_cast<int>(threadIdx.x);
  // Rounded as the history holds it, so that a norm equals its own entry.
  if (thread == 0) shared_squares = static_cast<float>(squares_of_first);
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
  const float norm = sqrtf(squares);
  const float clip = sqrtf(own);
  args.out[index] = norm;
  args.out[clipping.count + index] = clip;
  args.out[2 * clipping.count + index] = finite ? percentile_scale(norm, clip) : 1.0f;
}

template <class T>
__global__ void BNB_LAUNCH_BOUNDS(kThreads, kGradientResident)
    percentile_clipping_kernel(const BNB_GRID_CONSTANT GradientList list, float* partials) {
  BNB_DYNAMIC_SHARED(storage);
  __shared__ Squares scratch[kWarps];
  const Entries<GradientList> entries(list, storage);
  __syncthreads();
  const auto sum_of = [&](int e, uint32_t first, uint32_t last) {
    const auto& entry = entries[e];
    Squares sum{};
    int64_t begin = int64_t{first - entry.first_tile} * kPreviewTile;
    for (uint32_t tile = first; tile < last; ++tile, begin += kPreviewTile) {
      const bool whole = entry.packs != 0 && begin + kPreviewTile <= entry.tensor.n;
      sum.value += whole ? square_tile<true, T>(entry.tensor, begin)
                         : square_tile<false, T>(entry.tensor, begin);
    }
    return sum;
  };
  const auto write = [&](int e, const Squares& sum) {
    clip_gradient(list.header.args, entries[e].tensor.gnorm_vec, list.header.tensors_before + e,
                  sum.value);
  };
  over_tensors(list, entries, list.header.args.call.tickets, scratch, partials, sum_of, write);
}

using ClippingKernel = void (*)(const GradientList, float*);

int blocks_for(uint32_t tiles, int64_t most) {
  return static_cast<int>(std::min<int64_t>(tiles, most));
}

}  // namespace

void optimizer_preview(const OptimizerStep& args, StateFormat format,
                       std::span<const OptimizerTensor> tensors, float* partials, Stream stream) {
  const PreviewKernel kernel = choose_by_types<PreviewKernel>(
      args.rule, args.dtype, [&]<class R, class T>() { return choose<R, T>(format); });
  const int states = kRules[static_cast<int>(args.rule)].states;
  const bool codes = format != StateFormat::kFloat32;
  const int state_size = codes ? 1 : 4;
  const int code_pack = args.dtype == DType::kFloat32 ? 4 : 8;
  const auto packs = [&](const OptimizerTensor& t) {
    bool aligned = is_aligned(t.param, 16) && is_aligned(t.grad, 16);
    for (int k = 0; k < states; ++k) {
      aligned =
          aligned && is_aligned(state_pointer(t, states, k, state_size), codes ? code_pack : 16);
    }
    return aligned;
  };
  const int64_t most_blocks = int64_t{multiprocessors()} * kResident;
  const int most = entries_for<StepList>(reinterpret_cast<const void*>(kernel), kResident);
  for_each_launch<StepList>(args, tensors, kPreviewTile, 1, most, packs, [&](const StepList& list) {
    launch("optimizer_preview", kernel, blocks_for(list.header.tiles, most_blocks), kThreads,
           entry_bytes(list), stream, list, partials);
  });
}

void percentile_clipping(const PercentileClipping& args, std::span<const GradientTensor> tensors,
                         float* partials, Stream stream) {
  const ClippingKernel kernel = by_dtype(
      args.dtype, [&]<class T>() -> ClippingKernel { return percentile_clipping_kernel<T>; });
  const auto packs = [&](const GradientTensor& t) { return is_aligned(t.grad, 16); };
  const int64_t most_blocks = int64_t{multiprocessors()} * kGradientResident;
  const ClippingArgs call{args, static_cast<int>(tensors.size())};
  const int most =
      entries_for<GradientList>(reinterpret_cast<const void*>(kernel), kGradientResident);
  for_each_launch<GradientList>(
      call, tensors, kPreviewTile, 1, most, packs, [&](const GradientList& list) {
        launch("percentile_clipping", kernel, blocks_for(list.header.tiles, most_blocks), kThreads,
               entry_bytes(list), stream, list, partials);
      });
}

}  // namespace bnb::gpu
