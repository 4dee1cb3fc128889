// The functions of the library for C++ programs, on the CPU. gpu.h has them for GPUs, with the same
// arguments; docs/cpp.md explains both.
//
// Every function checks sizes, and pointers for null and alignment, and throws
// std::invalid_argument before it writes anything. What a pointer cannot tell is up to the caller:
// it leads to as many elements as its comment says, of which none that is written lies where
// another argument is. Functions may be called from several threads at once.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <functional>

#include "bitsandbytes/kernels/quantiles.h"
#include "bitsandbytes/kernels/quantize.h"
#include "bitsandbytes/kernels/quantize_4bit.h"

namespace bnb::cpu {

// The threads that a call may use. Results do not depend on them.
class Threads {
 public:
  using Body = std::function<void(int64_t first, int64_t last)>;
  // Calls body(first, last) with half-open ranges that make up [0, count), of `grain` or more
  // where that leaves several, at once from as many threads as it likes; returns after the last.
  using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

  // The calling thread and others, `count` in all, that are started in every call: worth it for
  // millions of elements. Small calls stay on the calling thread.
  Threads(int count = 1);  // implicit: a number says it all

  // `count` threads that the program has anyway.
  Threads(int count, ParallelFor parallel_for);

  int count() const { return count_; }
  void parallel_for(int64_t count, int64_t grain, const Body& body) const {
    parallel_for_(count, grain, body);
  }

 private:
  int count_;
  ParallelFor parallel_for_;
};

// The 256 levels of the dynamic maps (Dettmers 2015, arXiv:1511.04561): what `code` usually is.
const float* signed_dynamic_map();
const float* unsigned_dynamic_map();

// absmax[b] = max |a| over block b; out[i] = nearest code to a[i] * (1 / absmax[b]), or one of the
// two beside it if there are random numbers (Dettmers et al. 2021, arXiv:2110.02861).
void quantize_blockwise(const QuantizeBlockwise& args, const Threads& threads = {});

// out[i] = code[a[i]] * scale(i / block_size), rounded once to dtype.
void dequantize_blockwise(const DequantizeBlockwise& args, const Threads& threads = {});

// absmax[b] = max |a| over block b; the code of element i is that of a[i] * (1 / absmax[b])
// (Dettmers et al. 2023, arXiv:2305.14314).
void quantize_4bit(const Quantize4bit& args, const Threads& threads = {});

// out[i] = level(code i) * scale(i / block_size), rounded once to dtype.
void dequantize_4bit(const Dequantize4bit& args, const Threads& threads = {});

// 256 quantiles, each of them an element of the tensor.
void estimate_quantiles(const EstimateQuantiles& args, const Threads& threads = {});

}  // namespace bnb::cpu
