// CPU kernels: one table of functions per instruction set, picked once at first use.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bitsandbytes/code/buckets8.h"
#include "bitsandbytes/code/code.h"
#include "bitsandbytes/kernels/gemm_4bit.h"
#include "bitsandbytes/kernels/int8.h"
#include "bitsandbytes/kernels/optimizer.h"
#include "bitsandbytes/kernels/quantize.h"
#include "bitsandbytes/kernels/quantize_4bit.h"

namespace bnb::cpu {

// What encodes a table of ascending levels that is none of the dynamic maps.
struct SearchedCode {
  float thresholds[kCodeThresholds];
  bool buckets;      // serve it; otherwise it is searched
  bool front_apart;  // but not numbers next to zero
  bool bounded;      // elements are: those that no scale was found for are not
  uint32_t entries[2 * Thresholds8::kBuckets];
};

// A table of levels with how it is encoded.
struct Code {
  const float* levels;  // [256]
  CodeKind kind;
  alignas(64) uint8_t planes[4][kCodeLevels];  // byte p of every level, for lookups by bytes
};

Code prepare_code(const float* levels);
// `buckets`: try them, which takes time to fill them. They know numbers up to 1 only; `bounded`:
// there are no others.
void prepare_search(const float* levels, bool buckets, bool bounded, SearchedCode& code);

// Rows of a weight that are one piece of work, and columns of a 4-bit one for the backward pass.
inline constexpr int64_t kGemmPanel = 64;
inline constexpr int64_t kDgradPanel = 128;

// Bytes that a product needs, at addresses that are multiples of 64.
struct ProductSpace {
  int64_t staged;  // its first operand as its kernel reads it
  int64_t panel;   // of each thread
};

// Work is given as half-open ranges so that callers choose the threads.
struct Kernels {
  const char* isa;
  // `searched`: for codes of kind kTable.
  void (*quantize_blockwise)(const QuantizeBlockwise&, const Code&, const SearchedCode& searched,
                             int64_t first_block, int64_t last_block);
  void (*dequantize_blockwise)(const DequantizeBlockwise&, const Code&, int64_t first,
                               int64_t last);
  void (*quantize_4bit)(const Quantize4bit&, int64_t first_block, int64_t last_block);
  void (*dequantize_4bit)(const Dequantize4bit&, int64_t first_block, int64_t last_block);
  // Every row is staged before the product begins; each thread has a panel of its own.
  ProductSpace (*gemm_4bit_space)(const Gemm4bit&);
  void (*gemm_4bit_stage)(const Gemm4bit&, void* staged, int64_t first_row, int64_t last_row);
  void (*gemm_4bit)(const Gemm4bit&, const void* staged, void* panel, int64_t first_panel,
                    int64_t last_panel);
  ProductSpace (*gemm_4bit_dgrad_space)(const Gemm4bitDgrad&);
  void (*gemm_4bit_dgrad_stage)(const Gemm4bitDgrad&, void* staged, int64_t first_row,
                                int64_t last_row);
  void (*gemm_4bit_dgrad)(const Gemm4bitDgrad&, const void* staged, void* panel,
                          int64_t first_panel, int64_t last_panel);
  void (*int8_row_stats)(const Int8VectorwiseQuant&, int64_t first_row, int64_t last_row);
  void (*int8_quantize_rows)(const Int8VectorwiseQuant&, int64_t first_row, int64_t last_row);
  void (*int8_vectorwise_dequant)(const Int8VectorwiseDequant&, int64_t first_row,
                                  int64_t last_row);
  ProductSpace (*int8_matmul_space)(int64_t m, int64_t k);
  void (*int8_matmul_stage)(const int8_t* a, int64_t m, int64_t k, void* staged, int64_t first_row,
                            int64_t last_row);
  void (*int8_linear_matmul)(const Int8Matmul&, const void* staged, void* panel,
                             int64_t first_panel, int64_t last_panel);
  void (*int8_scaled_matmul)(const Int8ScaledMatmul&, const void* staged, void* panel,
                             int64_t first_panel, int64_t last_panel);
  void (*int8_mm_dequant)(const Int8MmDequant&, int64_t first_row, int64_t last_row);
  // `index`: of the tensor in its list. `codes`: of the states, where they are codes. Blocks are
  // of kOptimizerBlock elements, tiles of kPreviewTile.
  void (*optimizer_step)(const OptimizerStep&, StateFormat, const OptimizerTensor&, int64_t index,
                         const Code (&codes)[2], int64_t first_block, int64_t last_block);
  void (*optimizer_preview)(const OptimizerStep&, StateFormat, const OptimizerTensor&,
                            int64_t index, const Code (&codes)[2], int64_t first_tile,
                            int64_t last_tile,
                            float* partials);  // [tiles of the tensor, kPreviewNumbers]
  void (*gradient_squares)(DType, const GradientTensor&, int64_t first_tile, int64_t last_tile,
                           float* partials);  // [tiles of the tensor]
};

// The kernels in use: those named by the environment variable BNB_CPU_ISA if this processor has
// them, else the widest it has.
const Kernels& kernels();

// Names of the instruction sets this build has and this processor can run, widest first.
std::vector<std::string> available_isas();

// Switches to another one of available_isas(); false if `name` is not among them. For tests.
bool set_isa(const std::string& name);

}  // namespace bnb::cpu
