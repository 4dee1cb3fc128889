// What pointers and sizes tell about the arguments of a call, before anything is written: what
// cannot be right is a std::invalid_argument of one sentence.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bitsandbytes/blocks.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/quantiles.h"
#include "bitsandbytes/kernels/quantize.h"
#include "bitsandbytes/kernels/quantize_4bit.h"

namespace bnb {

// The checks of one call, of the function that the sentences begin with.
class ArgumentCheck {
 public:
  explicit ArgumentCheck(const char* function) : function_(function) {}

  template <class Number>
  void require(bool ok, const char* argument, const char* expected, Number got) const {
    if (!ok) [[unlikely]] {
      refuse(argument, expected, std::to_string(got));
    }
  }

  void size(const char* argument, int64_t n) const { require(n >= 0, argument, "0 or more", n); }

  void dtype(const char* argument, DType type) const {
    const int value = static_cast<int>(type);
    require(value >= 0 && value < kDTypeCount, argument, "kFloat32, kFloat16 or kBFloat16", value);
  }

  void code4(Code4 code) const {
    const int value = static_cast<int>(code);
    require(value >= 0 && value < kCode4Count, "code", "one of Code4", value);
  }

  void any_block_size(int64_t block_size) const {
    require(block_size > 0, "block_size", "above 0", block_size);
  }

  void power_of_two_block_size(int64_t block_size) const {
    require(block_size >= kLeastBlock && block_size <= kLargestBlock && log2_of(block_size) >= 0,
            "block_size", "a power of two from 32 to 4096", block_size);
  }

  // Of `count` elements, which a null pointer has none of.
  template <class T>
  void pointer(const char* argument, const T* p, int64_t count) const {
    place(argument, p, count, sizeof(T));
  }
  void pointer(const char* argument, const void* p, int64_t count, DType type) const {
    place(argument, p, count, type == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
  }

  void scales(const Scales& scales, int64_t blocks) const {
    if (!scales.nested()) return pointer("scales.absmax", scales.absmax, blocks);
    require(scales.block_size > 0, "scales.block_size", "above 0", scales.block_size);
    pointer("scales.absmax", scales.absmax, ceil_div(blocks, scales.block_size));
    pointer("scales.code", scales.code, kCodeLevels);
    pointer("scales.offset", scales.offset, 1);
  }

 private:
  void place(const char* argument, const void* p, int64_t count, size_t bytes) const {
    if (p == nullptr && count > 0) [[unlikely]] {
      refuse(argument, "a pointer to its elements", "null");
    }
    if (const uintptr_t rest = reinterpret_cast<uintptr_t>(p) % bytes; rest != 0) [[unlikely]] {
      refuse(argument, "at a multiple of " + std::to_string(bytes) + " bytes",
             "an address " + std::to_string(rest) + " bytes behind one");
    }
  }

  [[noreturn, gnu::cold, gnu::noinline]] void refuse(const char* argument,
                                                     const std::string& expected,
                                                     const std::string& got) const {
    throw std::invalid_argument(std::string(function_) + ": " + argument + " must be " + expected +
                                ", got " + got);
  }

  const char* function_;
};

// The block sizes that a processor takes.
enum class BlockSizes { kAny, kPowersOfTwo };

inline void check_arguments(const QuantizeBlockwise& args, BlockSizes sizes) {
  const ArgumentCheck check("quantize_blockwise");
  check.dtype("dtype", args.dtype);
  check.size("n", args.n);
  sizes == BlockSizes::kAny ? check.any_block_size(args.block_size)
                            : check.power_of_two_block_size(args.block_size);
  check.pointer("a", args.a, args.n, args.dtype);
  check.pointer("code", args.code, kCodeLevels);
  check.pointer("out", args.out, args.n);
  check.pointer("absmax", args.absmax, 0);  // may be null
  if (args.rand == nullptr) return;
  check.require(args.rand_size > 0, "rand_size", "above 0", args.rand_size);
  check.require(args.rand_offset >= 0 && args.rand_offset < args.rand_size, "rand_offset",
                "0 to rand_size - 1", args.rand_offset);
  check.pointer("rand", args.rand, args.rand_size);
}

inline void check_arguments(const DequantizeBlockwise& args) {
  const ArgumentCheck check("dequantize_blockwise");
  check.dtype("dtype", args.dtype);
  check.size("n", args.n);
  check.any_block_size(args.block_size);
  check.pointer("a", args.a, args.n);
  check.scales(args.scales, ceil_div(args.n, args.block_size));
  check.pointer("code", args.code, kCodeLevels);
  check.pointer("out", args.out, args.n, args.dtype);
}

inline void check_arguments(const Quantize4bit& args) {
  const ArgumentCheck check("quantize_4bit");
  check.dtype("dtype", args.dtype);
  check.code4(args.code);
  check.size("n", args.n);
  check.power_of_two_block_size(args.block_size);
  check.pointer("a", args.a, args.n, args.dtype);
  check.pointer("out", args.out, ceil_div(args.n, 2));
  check.pointer("absmax", args.absmax, ceil_div(args.n, args.block_size));
}

inline void check_arguments(const Dequantize4bit& args) {
  const ArgumentCheck check("dequantize_4bit");
  check.dtype("dtype", args.dtype);
  check.code4(args.code);
  check.size("n", args.n);
  check.power_of_two_block_size(args.block_size);
  check.pointer("a", args.a, ceil_div(args.n, 2));
  check.scales(args.scales, ceil_div(args.n, args.block_size));
  check.pointer("out", args.out, args.n, args.dtype);
}

inline void check_arguments(const EstimateQuantiles& args) {
  const ArgumentCheck check("estimate_quantiles");
  check.dtype("dtype", args.dtype);
  check.require(args.n > 0, "n", "above 0", args.n);
  check.require(args.offset >= 0.0 && args.offset <= 0.5, "offset", "0 to 0.5", args.offset);
  check.pointer("a", args.a, args.n, args.dtype);
  check.pointer("out", args.out, kQuantiles);
}

}  // namespace bnb
