// Products of groups of rows, with a 4-bit weight for each group: arguments.
// SPDX-License-Identifier: MIT
#pragma once

#include "bitsandbytes/kernels/gemm_4bit.h"

namespace bnb {

// Rows of a matrix in consecutive groups, as tokens that are sorted by their expert: those of group
// i are [begin(i), end(i)). Rows behind the last group are of none.
struct Groups {
  const void* ends;  // [count] of int32, or of int64 with `wide`; ascending
  bool wide;
  int64_t count;
  int64_t rows;  // of the matrix

  // A device's ends cannot be checked: bad ones give bad results, but no row outside the matrix.
  BNB_HD int64_t end(int64_t i) const {
    const int64_t value =
        wide ? static_cast<const int64_t*>(ends)[i] : int64_t{static_cast<const int32_t*>(ends)[i]};
    return value < 0 ? 0 : (value < rows ? value : rows);
  }
  BNB_HD int64_t begin(int64_t i) const { return i > 0 ? end(i - 1) : 0; }
};

// out = a w^T + bias for the rows of each group with its w and bias, 0 for rows of none. `weight`
// is that of the first group; those of the others follow it, as one higher matrix.
struct GroupedGemm4bit {
  DType dtype;
  const void* a;  // [rows, k] of dtype
  Weight4bit weight;
  const void* bias;  // [groups, n] of dtype, or null
  void* out;         // [rows, n] of dtype
  Groups groups;
};

// out = grad w in the same way, for the backward pass.
struct GroupedGemm4bitDgrad {
  DType dtype;
  const void* grad;  // [rows, n] of dtype
  Weight4bit weight;
  void* out;  // [rows, k] of dtype
  Groups groups;
};

// ---- The product of one group -------------------------------------------------------------------

BNB_HD int64_t bytes_of(DType dtype, int64_t elements) {
  return (dtype == DType::kFloat32 ? 4 : 2) * elements;
}
BNB_HD const void* advance(const void* p, int64_t bytes) {
  return p == nullptr ? p : static_cast<const char*>(p) + bytes;
}
BNB_HD void* advance(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

BNB_HD Weight4bit weight_of(const Weight4bit& first, int64_t group) {
  Weight4bit weight = first;
  weight.first_row += group * first.n;
  return weight;
}

BNB_HD Gemm4bit product_of(const GroupedGemm4bit& args, int64_t group) {
  const int64_t begin = args.groups.begin(group);
  const int64_t n = args.weight.n;
  return {args.dtype,
          advance(args.a, bytes_of(args.dtype, begin * args.weight.k)),
          weight_of(args.weight, group),
          advance(args.bias, bytes_of(args.dtype, group * n)),
          advance(args.out, bytes_of(args.dtype, begin * n)),
          args.groups.end(group) - begin};
}

BNB_HD Gemm4bitDgrad product_of(const GroupedGemm4bitDgrad& args, int64_t group) {
  const int64_t begin = args.groups.begin(group);
  return {args.dtype, advance(args.grad, bytes_of(args.dtype, begin * args.weight.n)),
          weight_of(args.weight, group),
          advance(args.out, bytes_of(args.dtype, begin * args.weight.k)),
          args.groups.end(group) - begin};
}

namespace gpu {

// The products of a GPU; groups are read on the device. `workspace` as for gemm_4bit().
// *_is_fast(): whether the product beats that of the vendor's library on dequantized weights, or
// that library does not take the arguments.
bool grouped_gemm_4bit_is_fast(const GroupedGemm4bit& args);
int64_t grouped_gemm_4bit_workspace_bytes(const GroupedGemm4bit& args);
void grouped_gemm_4bit(const GroupedGemm4bit& args, void* workspace, Stream stream);

bool grouped_gemm_4bit_dgrad_is_fast(const GroupedGemm4bitDgrad& args);
void grouped_gemm_4bit_dgrad(const GroupedGemm4bitDgrad& args, Stream stream);

}  // namespace gpu
}  // namespace bnb
