// Optimizer steps on the CPU: one loop for every rule, element type and format of the states, and
// one for the preview that some steps need.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/optim/step.h"
#include "bitsandbytes/philox.h"
#include "cpu/vectors.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

template <StateFormat kFormat>
struct Format {
  static constexpr StateFormat value = kFormat;
};

constexpr int64_t block_length(int64_t n, int64_t block) {
  const int64_t rest = n - block * kOptimizerBlock;
  return rest < kOptimizerBlock ? rest : kOptimizerBlock;
}

// The states of a few consecutive blocks of a tensor as its rule sees them, whatever they are
// stored as. Where encode is quick, two blocks at a time: the first code of a block waits for its
// absmax, and that for the last element of the block.
template <class R, StateFormat kFormat>
class StateRun {
 public:
  static constexpr bool kCodes = kFormat != StateFormat::kFloat32;
  static constexpr int kBlocks = kCodes && kEncodeRun > 0 ? 2 : 1;

  StateRun(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t index,
           const Code (&codes)[2])
      : args_(args), tensor_(tensor), index_(index), codes_(codes) {}

  // One block of the run.
  struct Block {
    Float scale[R::kStates];
    Int most[R::kStates];
    float* values[R::kStates];

    BNB_HD Float load(int k, int64_t i, int64_t count) const {
      const Float x = load_some(values[k] + i, count);
      if constexpr (kCodes) return x * scale[k];
      return x;
    }

    BNB_HD void store(int k, int64_t i, Float s, int64_t count) {
      store_some(values[k] + i, s, count);
      // Lanes past the end hold the update of zeros: zeros, which no maximum notices.
      if constexpr (kCodes) most[k] = max(most[k], magnitude_bits(s));
    }
  };

  BNB_HD void open(int64_t first, int64_t last) {
    first_ = first;
    if constexpr (kCodes) {
      const int64_t begin = first * kOptimizerBlock;
      const int64_t end = last * kOptimizerBlock < tensor_.n ? last * kOptimizerBlock : tensor_.n;
      for (int k = 0; k < R::kStates; ++k) {
        decode(code(k), stored<uint8_t>(k, first), buffer_[k], end - begin);
      }
    }
  }

  BNB_HD Block block(int64_t b) {
    Block block;
    for (int k = 0; k < R::kStates; ++k) {
      if constexpr (kCodes) {
        block.most[k] = broadcast_int(0);
        block.scale[k] = Float(kFormat == StateFormat::kBlockwise8bit
                                   ? *absmax(k, b)
                                   : args_.max[tensor_of_state(R::kStates, k)][index_]);
        block.values[k] = buffer_[k] + (b - first_) * kOptimizerBlock;
      } else {
        block.values[k] = stored<float>(k, b);
      }
    }
    return block;
  }

  // After all elements of block b were stored.
  BNB_HD void measure(int64_t b, const Block& block) {
    if constexpr (kCodes) {
      for (int k = 0; k < R::kStates; ++k) {
        float largest = reduce_absmax(block.most[k]);
        if (!is_finite(largest)) [[unlikely]] {
          largest = 0.0f;
          for (int64_t i = 0; i < block_length(tensor_.n, b); ++i) {
            block.values[k][i] = finite_state(block.values[k][i]);
            largest = absmax_of(largest, block.values[k][i]);
          }
        }
        if constexpr (kFormat == StateFormat::kBlockwise8bit) {
          *absmax(k, b) = largest;
        } else {
          largest = args_.new_max[tensor_of_state(R::kStates, k)][index_];
        }
        largest_[k][b - first_] = largest;
      }
    }
  }

  BNB_HD void encode(int64_t b) {
    if constexpr (kCodes) {
      const int64_t j = b - first_;
      for (int k = 0; k < R::kStates; ++k) {
        encode_block<true>(code(k), buffer_[k] + j * kOptimizerBlock, stored<uint8_t>(k, b),
                           block_length(tensor_.n, b), largest_[k][j]);
      }
    }
  }

 private:
  BNB_HD const Code& code(int k) const { return codes_[tensor_of_state(R::kStates, k)]; }

  template <class Value>
  BNB_HD Value* stored(int k, int64_t b) const {
    return static_cast<Value*>(tensor_.state[tensor_of_state(R::kStates, k)]) +
           row_of_state(R::kStates, k) * tensor_.n + b * kOptimizerBlock;
  }

  BNB_HD float* absmax(int k, int64_t b) const {
    return tensor_.absmax[tensor_of_state(R::kStates, k)] +
           row_of_state(R::kStates, k) * ceil_div(tensor_.n, kOptimizerBlock) + b;
  }

  const OptimizerStep& args_;
  const OptimizerTensor& tensor_;
  const int64_t index_;
  const Code (&codes_)[2];
  int64_t first_ = 0;
  float largest_[R::kStates][kBlocks];
  // Old levels, then new states.
  alignas(64) float buffer_[R::kStates][kBlocks * kOptimizerBlock];
};

// ---- Rounding of parameters ---------------------------------------------------------------------

template <class T>
class Rounding {
 public:
  Rounding(const OptimizerStep&, int64_t) {}
  BNB_HD void open(int64_t) {}
  BNB_HD void store(T* p, int64_t, Float x, int64_t count) const { store_some(p, x, count); }
};

// Stochastic where the caller wishes: random bits are added below those that stay.
template <>
class Rounding<BFloat16> {
 public:
  Rounding(const OptimizerStep& args, int64_t index)
      : stochastic_(args.stochastic_rounding),
        seed_(args.seed),
        tensor_(static_cast<uint32_t>(index)),
        step_(*args.step + 1) {}

  void open(int64_t block) {
    if (!stochastic_) return;
    for (int g = 0; g < kGroups; ++g) {
      const PhiloxWords words = rounding_words(seed_, block * kGroups + g, tensor_, step_);
      for (int e = 0; e < kRoundingGroup; ++e) {
        random_[g * kRoundingGroup + e] = {static_cast<uint16_t>(rounding_bits(words, e))};
      }
    }
  }

  BNB_HD void store(BFloat16* p, int64_t i, Float x, int64_t count) const {
    if (stochastic_) {
      const Int random = shift_right<16>(bits(load(random_ + i)));
      const Mask number = less(magnitude_bits(x), broadcast_int(0x7f800001));
      const Float cut = from_bits((bits(x) + random) & broadcast_int(~0xffff));
      x = select(number, cut, x);
    }
    store_some(p, x, count);
  }

 private:
  static constexpr int kGroups = kOptimizerBlock / kRoundingGroup;
  const bool stochastic_;
  const uint64_t seed_;
  const uint32_t tensor_;
  const int64_t step_;
  alignas(64) BFloat16 random_[kOptimizerBlock];  // 16 random bits per element
};

// ---- The step -----------------------------------------------------------------------------------

BNB_HD float factor_of(const float* factors,  // [tensors] or null
                       int64_t index) {
  return factors != nullptr ? factors[index] : 1.0f;
}

template <class R, class T, StateFormat kFormat>
void step_blocks(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t index,
                 const Code (&codes)[2], int64_t first_block, int64_t last_block) {
  const Step<R> step =
      Step<R>::make(args.hyper, *args.step + 1, args.lr)
          .scaled(factor_of(args.gnorm_scales, index), factor_of(args.update_scales, index));
  using States = StateRun<R, kFormat>;
  States states(args, tensor, index, codes);
  Rounding<T> rounding(args, index);
  for (int64_t first = first_block; first < last_block; first += States::kBlocks) {
    const int64_t last =
        first + States::kBlocks < last_block ? first + States::kBlocks : last_block;
    states.open(first, last);
    bool idle[States::kBlocks];
    for (int64_t b = first; b < last; ++b) {
      T* const param = static_cast<T*>(tensor.param) + b * kOptimizerBlock;
      const T* const grad = static_cast<const T*>(tensor.grad) + b * kOptimizerBlock;
      auto block = states.block(b);
      rounding.open(b);
      bool skipped = step.skip_zeros;
      for_each_vector(0, block_length(tensor.n, b), [&](int64_t i, int64_t count) {
        if constexpr (States::kBlocks > 1) {
          // For the next run: while codes are made, the memory would stand idle.
          __builtin_prefetch(grad + i + States::kBlocks * kOptimizerBlock);
          __builtin_prefetch(param + i + States::kBlocks * kOptimizerBlock, 1);
        }
        Float g = load_some(grad + i, count);
        if (step.gnorm_scale != 1.0f) g = g * Float(step.gnorm_scale);
        const Float p = load_some(param + i, count);
        Float s[R::kStates];
        Float old[R::kStates];
        for (int k = 0; k < R::kStates; ++k) old[k] = s[k] = block.load(k, i, count);
        Float updated = step.advance(g, p, s);
        if constexpr (States::kCodes) {
          // A gradient that is not finite has no use: its element loses the state and keeps the
          // parameter.
          const Mask finite = less(magnitude_bits(g), broadcast_int(0x7f800000));
          if (!all(finite)) [[unlikely]] {
            updated = select(finite, updated, p);
            for (int k = 0; k < R::kStates; ++k) s[k] = select(finite, s[k], Float(0.0f));
          }
        }
        if (step.skip_zeros) {
          const Mask skip = equal(g, Float(0.0f));
          skipped = skipped && all(skip);
          updated = select(skip, p, updated);
          for (int k = 0; k < R::kStates; ++k) s[k] = select(skip, old[k], s[k]);
        }
        rounding.store(param + i, i, updated, count);
        for (int k = 0; k < R::kStates; ++k) block.store(k, i, s[k], count);
      });
      // Codes that mean the same numbers again would still lose a little each time. A scale of the
      // whole tensor may change, though, when a single block is idle.
      idle[b - first] = skipped && kFormat != StateFormat::kTensor8bit;
      if (!idle[b - first]) states.measure(b, block);
    }
    for (int64_t b = first; b < last; ++b) {
      if (!idle[b - first]) states.encode(b);
    }
  }
}

// ---- Sums of squares ----------------------------------------------------------------------------

// In an order that neither the width of vectors nor the number of threads changes: the elements of
// a block are summed in sixteen float numbers, in turn, and those in double.
class SquareSum {
 public:
  SquareSum() { clear(); }

  BNB_HD void add(int64_t i, Float x) {
    Float& lane = lanes_[i / kLanes % kVectors];
    lane = fma(x, x, lane);
  }

  // After the last element of a block.
  void close_block() {
    float lanes[kSumLanes];
    for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes, lanes_[v]);
    for (const float lane : lanes) total_ += lane;
    clear();
  }

  float total() const { return static_cast<float>(total_); }

 private:
  static constexpr int kSumLanes = 16;
  static constexpr int kVectors = kSumLanes / kWidth;

  BNB_HD void clear() {
    for (Float& lane : lanes_) lane = Float(0.0f);
  }

  Float lanes_[kVectors];
  double total_ = 0.0;
};

constexpr int64_t kTileBlocks = kPreviewTile / kOptimizerBlock;

// Blocks of a tile: [tile * kTileBlocks, end_of_tile(n, tile)).
BNB_HD int64_t end_of_tile(int64_t n, int64_t tile) {
  const int64_t blocks = ceil_div(n, kOptimizerBlock);
  const int64_t end = (tile + 1) * kTileBlocks;
  return end < blocks ? end : blocks;
}

template <class T>
void square_tiles(const GradientTensor& tensor, int64_t first_tile, int64_t last_tile,
                  float* partials) {  // [tiles of the tensor]
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    SquareSum squares;
    for (int64_t b = tile * kTileBlocks; b < end_of_tile(tensor.n, tile); ++b) {
      const T* const grad = static_cast<const T*>(tensor.grad) + b * kOptimizerBlock;
      for_each_vector(0, block_length(tensor.n, b), [&](int64_t i, int64_t count) {
        squares.add(i, load_some(grad + i, count));
      });
      squares.close_block();
    }
    partials[tile] = squares.total();
  }
}

// ---- The preview --------------------------------------------------------------------------------

// What finite_state() leaves of a state, as a magnitude.
BNB_HD Int finite_magnitude_bits(Float s) {
  const Int m = magnitude_bits(s);
  const Int number = select(less(m, broadcast_int(0x7f800001)), m, broadcast_int(0));
  return min(number, broadcast_int(static_cast<int32_t>(float_bits(kFloatMax))));
}

template <class R, class T, StateFormat kFormat>
void preview_tiles(const OptimizerStep& args, const OptimizerTensor& tensor, int64_t index,
                   const Code (&codes)[2], int64_t first_tile, int64_t last_tile,
                   float* partials) {  // [tiles of the tensor, kPreviewNumbers]
  const Step<R> step = Step<R>::make_preview(args.hyper, *args.step + 1)
                           .scaled(factor_of(args.gnorm_scales, index), 1.0f);
  using States = StateRun<R, kFormat>;
  States states(args, tensor, index, codes);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    SquareSum params;
    SquareSum updates;
    Int most[R::kStates];
    for (Int& m : most) m = broadcast_int(0);
    bool idle = step.skip_zeros;  // every element is skipped
    for (int64_t b = tile * kTileBlocks; b < end_of_tile(tensor.n, tile); ++b) {
      const T* const param = static_cast<const T*>(tensor.param) + b * kOptimizerBlock;
      const T* const grad = static_cast<const T*>(tensor.grad) + b * kOptimizerBlock;
      states.open(b, b + 1);
      const auto block = states.block(b);
      for_each_vector(0, block_length(tensor.n, b), [&](int64_t i, int64_t count) {
        const Float g = load_some(grad + i, count) * Float(step.gnorm_scale);
        const Float p = load_some(param + i, count);
        Float s[R::kStates];
        Float old[R::kStates];
        for (int k = 0; k < R::kStates; ++k) old[k] = s[k] = block.load(k, i, count);
        Float update = step.preview(g, p, s);
        if constexpr (States::kCodes) {
          const Mask finite = less(magnitude_bits(g), broadcast_int(0x7f800000));
          update = select(finite, update, Float(0.0f));
          for (int k = 0; k < R::kStates; ++k) s[k] = select(finite, s[k], Float(0.0f));
        }
        if (step.skip_zeros) {
          const Mask skip = equal(g, Float(0.0f));
          idle = idle && all(skip);
          update = select(skip, Float(0.0f), update);
          for (int k = 0; k < R::kStates; ++k) s[k] = select(skip, old[k], s[k]);
        }
        params.add(i, p);
        updates.add(i, update);
        if constexpr (kFormat == StateFormat::kTensor8bit) {
          for (int k = 0; k < R::kStates; ++k) most[k] = max(most[k], finite_magnitude_bits(s[k]));
        }
      });
      params.close_block();
      updates.close_block();
    }
    float* const partial = partials + tile * kPreviewNumbers;
    partial[0] = params.total();
    partial[1] = updates.total();
    partial[2] = partial[3] = 0.0f;
    partial[4] = idle ? 0.0f : 1.0f;
    if constexpr (kFormat == StateFormat::kTensor8bit) {
      for (int k = 0; k < R::kStates; ++k) partial[2 + k] = reduce_absmax(most[k]);
    }
  }
}

}  // namespace
}  // namespace bnb::cpu::BNB_ISA
