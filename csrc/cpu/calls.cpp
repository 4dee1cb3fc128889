// Whole calls on the CPU: arguments checked, work cut into ranges for threads.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/cpu.h"
#include "bitsandbytes/kernels/check.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/quantiles.h"
#include "cpu/quantize.h"
#include "cpu/tables.h"

namespace bnb::cpu {
namespace {

// Equal parts for up to `threads` threads, of which the calling one takes the first.
void start_threads(int threads, int64_t count, int64_t grain, const Threads::Body& body) {
  const int64_t parts = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, threads);
  const int64_t more = count % parts;  // parts that have one index more than the others
  const auto start = [&](int64_t part) { return count / parts * part + std::min(part, more); };
  std::vector<std::jthread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t part = 1; part < parts; ++part) {
    others.emplace_back(
        [&body, first = start(part), last = start(part + 1)] { body(first, last); });
  }
  body(0, start(1));
}

}  // namespace

Threads::Threads(int count)
    : Threads(count, [count](int64_t n, int64_t grain, const Body& body) {
        start_threads(count, n, grain, body);
      }) {}

Threads::Threads(int count, ParallelFor parallel_for)
    : count_(count), parallel_for_(std::move(parallel_for)) {
  const ArgumentCheck check("Threads");
  check.require(count > 0, "count", "above 0", count);
  check.require(parallel_for_ != nullptr, "parallel_for", "a function", 0);
}

const float* signed_dynamic_map() { return kSignedLevels.values; }
const float* unsigned_dynamic_map() { return kUnsignedLevels.values; }

void quantize_blockwise(const QuantizeBlockwise& args, const Threads& threads) {
  check_arguments(args, BlockSizes::kAny);
  const Quantizer quantizer(args);
  parallel(threads, ceil_div(args.n, args.block_size), args.block_size,
           [&](int64_t first, int64_t last) { quantizer.run(first, last); });
}

void dequantize_blockwise(const DequantizeBlockwise& args, const Threads& threads) {
  check_arguments(args);
  const Code code = prepare_code(args.code);
  const Kernels& isa = kernels();
  parallel(threads, args.n, 1,
           [&](int64_t first, int64_t last) { isa.dequantize_blockwise(args, code, first, last); });
}

void quantize_4bit(const Quantize4bit& args, const Threads& threads) {
  check_arguments(args);
  const Kernels& isa = kernels();
  parallel(threads, ceil_div(args.n, args.block_size), args.block_size,
           [&](int64_t first, int64_t last) { isa.quantize_4bit(args, first, last); });
}

void dequantize_4bit(const Dequantize4bit& args, const Threads& threads) {
  check_arguments(args);
  const Kernels& isa = kernels();
  parallel(threads, ceil_div(args.n, args.block_size), args.block_size,
           [&](int64_t first, int64_t last) { isa.dequantize_4bit(args, first, last); });
}

void estimate_quantiles(const EstimateQuantiles& args, const Threads& threads) {
  check_arguments(args);
  QuantileSearch search(args, std::clamp<int64_t>(args.n / kGrain, 1, threads.count()));
  for (int pass = 0; pass < search.passes(); ++pass) {
    threads.parallel_for(search.pieces(), 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) search.count(pass, piece);
    });
    search.locate(pass);
  }
}

}  // namespace bnb::cpu
