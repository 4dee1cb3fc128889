// Every CPU kernel, compiled once per instruction set: the including file defines BNB_ISA and
// includes the vector interface of that name (simd/). No header with inline functions of the
// standard library may be included here: a copy compiled for AVX-512 could become the one that the
// linker keeps for all.
// SPDX-License-Identifier: MIT

#include <cstdint>

#include "cpu/gemm_4bit.inl"
#include "cpu/gemm_4bit_dgrad.inl"
#include "cpu/int8_matmul.inl"
#include "cpu/isa/isa.h"
#include "cpu/optimizer.inl"
#include "cpu/quantize.inl"
#include "cpu/quantize_4bit.inl"
#include "cpu/types.inl"

namespace bnb::cpu::BNB_ISA {
namespace {

// ---- Run-time types to templates ---------------------------------------------------------------

template <class Body>
void by_code4(Code4 code, const Body& body) {
  switch (code) {
#define BNB_CASE(code) \
  case Code4::k##code: \
    return body(Type<code>{});
    BNB_CODES4(BNB_CASE)
#undef BNB_CASE
    case Code4::kCount:
      return;
  }
}

template <class Body>
void by_rule(Rule rule, const Body& body) {
  switch (rule) {
#define BNB_CASE(rule) \
  case Rule::k##rule:  \
    return body(Type<rule>{});
    BNB_OPTIMIZERS(BNB_CASE)
#undef BNB_CASE
    case Rule::kCount:
      return;
  }
}

// Calls body(rule, element type, format).
template <class Body>
void by_step(const OptimizerStep& args, StateFormat format, const Body& body) {
  by_rule(args.rule, [&](auto rule) {
    using R = typename decltype(rule)::type;
    by_dtype(args.dtype, [&](auto type) {
      switch (format) {
        case StateFormat::kFloat32:
          return body(rule, type, Format<StateFormat::kFloat32>{});
        case StateFormat::kBlockwise8bit:
          return body(rule, type, Format<StateFormat::kBlockwise8bit>{});
        case StateFormat::kTensor8bit:
          if constexpr (R::kStates <= 2) body(rule, type, Format<StateFormat::kTensor8bit>{});
      }
    });
  });
}

// ---- The table ----------------------------------------------------------------------------------

void quantize_blockwise(const QuantizeBlockwise& args, const Code& code,
                        const SearchedCode& searched, int64_t first_block, int64_t last_block) {
  by_dtype(args.dtype, [&](auto type) {
    quantize_blocks<typename decltype(type)::type>(args, code, searched, first_block, last_block);
  });
}

void dequantize_blockwise(const DequantizeBlockwise& args, const Code& code, int64_t first,
                          int64_t last) {
  by_dtype(args.dtype, [&](auto type) {
    dequantize_range<typename decltype(type)::type>(args, code, first, last);
  });
}

void quantize_4bit(const Quantize4bit& args, int64_t first_block, int64_t last_block) {
  by_code4(args.code, [&](auto code) {
    by_dtype(args.dtype, [&](auto type) {
      quantize_blocks_4bit<typename decltype(code)::type, typename decltype(type)::type>(
          args, first_block, last_block);
    });
  });
}

void dequantize_4bit(const Dequantize4bit& args, int64_t first_block, int64_t last_block) {
  by_code4(args.code, [&](auto code) {
    by_dtype(args.dtype, [&](auto type) {
      dequantize_blocks_4bit<typename decltype(code)::type, typename decltype(type)::type>(
          args, first_block, last_block);
    });
  });
}

void int8_row_stats(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  by_dtype(args.dtype,
           [&](auto type) { row_stats<typename decltype(type)::type>(args, first_row, last_row); });
}

void int8_quantize_rows(const Int8VectorwiseQuant& args, int64_t first_row, int64_t last_row) {
  by_dtype(args.dtype, [&](auto type) {
    quantize_rows<typename decltype(type)::type>(args, first_row, last_row);
  });
}

void int8_vectorwise_dequant(const Int8VectorwiseDequant& args, int64_t first_row,
                             int64_t last_row) {
  by_dtype(args.dtype, [&](auto type) {
    dequantize_rows<typename decltype(type)::type>(args, first_row, last_row);
  });
}

void int8_mm_dequant(const Int8MmDequant& args, int64_t first_row, int64_t last_row) {
  by_dtype(args.dtype, [&](auto type) {
    mm_dequant_rows<typename decltype(type)::type>(args, first_row, last_row);
  });
}

void optimizer_step(const OptimizerStep& args, StateFormat format, const OptimizerTensor& tensor,
                    int64_t index, const Code (&codes)[2], int64_t first_block,
                    int64_t last_block) {
  by_step(args, format, [&](auto rule, auto type, auto states) {
    step_blocks<typename decltype(rule)::type, typename decltype(type)::type,
                decltype(states)::value>(args, tensor, index, codes, first_block, last_block);
  });
}

void optimizer_preview(const OptimizerStep& args, StateFormat format, const OptimizerTensor& tensor,
                       int64_t index, const Code (&codes)[2], int64_t first_tile, int64_t last_tile,
                       float* partials) {
  by_step(args, format, [&](auto rule, auto type, auto states) {
    preview_tiles<typename decltype(rule)::type, typename decltype(type)::type,
                  decltype(states)::value>(args, tensor, index, codes, first_tile, last_tile,
                                           partials);
  });
}

void gradient_squares(DType dtype, const GradientTensor& tensor, int64_t first_tile,
                      int64_t last_tile, float* partials) {
  by_dtype(dtype, [&](auto type) {
    square_tiles<typename decltype(type)::type>(tensor, first_tile, last_tile, partials);
  });
}

#define BNB_QUOTE_(x) #x
#define BNB_QUOTE(x) BNB_QUOTE_(x)

constexpr Kernels kTable = {
    BNB_QUOTE(BNB_ISA),    quantize_blockwise,      dequantize_blockwise, quantize_4bit,
    dequantize_4bit,       gemm_4bit_space,         gemm_4bit_stage,      gemm_4bit,
    gemm_4bit_dgrad_space, gemm_4bit_dgrad_stage,   gemm_4bit_dgrad,      int8_row_stats,
    int8_quantize_rows,    int8_vectorwise_dequant, int8_matmul_space,    int8_matmul_stage,
    int8_linear_matmul,    int8_scaled_matmul,      int8_mm_dequant,      optimizer_step,
    optimizer_preview,     gradient_squares,
};

#undef BNB_QUOTE
#undef BNB_QUOTE_

}  // namespace

const Kernels* kernel_table() { return &kTable; }

}  // namespace bnb::cpu::BNB_ISA
