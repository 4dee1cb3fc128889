// From partial results of tiles to whole tensors; sums in double, in the order of the tiles.
// SPDX-License-Identifier: MIT
#include "cpu/bounds.h"

#include <algorithm>
#include <cmath>

#include "bitsandbytes/optim/clipping.h"

namespace bnb::cpu {

void finish_preview(const OptimizerStep& args, std::span<const OptimizerTensor> tensors,
                    const float* partials) {
  const float* partial = partials;
  for (size_t i = 0; i < tensors.size(); ++i) {
    double param_squares = 0.0;
    double update_squares = 0.0;
    float most[2] = {};
    bool active = false;
    for (int64_t tile = ceil_div(tensors[i].n, kPreviewTile); tile > 0; --tile) {
      param_squares += partial[0];
      update_squares += partial[1];
      for (int k = 0; k < 2; ++k) most[k] = std::max(most[k], partial[2 + k]);
      active = active || partial[4] != 0.0f;
      partial += kPreviewNumbers;
    }
    if (args.param_squares != nullptr) args.param_squares[i] = static_cast<float>(param_squares);
    if (args.unorm != nullptr) args.unorm[i] = static_cast<float>(update_squares);
    if (args.new_update_scales != nullptr) {
      args.new_update_scales[i] =
          bounded_update_scale(param_squares, update_squares, args.max_unorm);
    }
    for (int k = 0; k < 2; ++k) {
      if (args.new_max[k] == nullptr) continue;
      // A tensor that stands still as a whole keeps its scale, and with it every code.
      args.new_max[k][i] = active ? most[k] : args.max[k][i];
    }
  }
}

void leave_step(const OptimizerStep& args, size_t tensors) {
  if (args.counter == nullptr) return;
  for (int k = 0; k < 2; ++k) {
    if (args.kept_max[k] != nullptr) std::copy_n(args.new_max[k], tensors, args.kept_max[k]);
  }
  *args.counter += 1;
}

void finish_percentile_clipping(const PercentileClipping& args,
                                std::span<const GradientTensor> tensors, const float* partials) {
  const int64_t number = *args.step + 1;
  const size_t count = tensors.size();
  for (size_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (int64_t tile = ceil_div(tensors[i].n, kPreviewTile); tile > 0; --tile) sum += *partials++;
    // Rounded as the history holds it, so that a norm equals its own entry.
    const float squares = static_cast<float>(sum);
    float* const history = tensors[i].gnorm_vec;
    const bool finite = is_finite(squares);
    if (finite) {
      const bool empty =
          std::all_of(history, history + kNormHistory, [](float square) { return square == 0.0f; });
      if (number == 1 || empty) std::fill_n(history, kNormHistory, squares);
      history[number % kNormHistory] = squares;
    }
    uint32_t sorted[kNormHistory];  // as integers, whose order has a place for NaN
    std::transform(history, history + kNormHistory, sorted, float_bits);
    std::nth_element(sorted, sorted + args.percentile, sorted + kNormHistory);
    const float norm = std::sqrt(squares);
    const float clip = std::sqrt(bits_float(sorted[args.percentile]));
    args.out[i] = norm;
    args.out[count + i] = clip;
    args.out[2 * count + i] = finite ? percentile_scale(norm, clip) : 1.0f;
  }
}

}  // namespace bnb::cpu
