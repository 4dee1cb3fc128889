// The kernels for AVX-512 whose products are those of AVX-512 BF16; the others stay as they are.
// SPDX-License-Identifier: MIT
#include "cpu/simd/avx512_bf16.h"

#define BNB_ISA avx512_bf16
#include "cpu/gemm_4bit.inl"
#include "cpu/gemm_4bit_dgrad.inl"
#include "cpu/isa/isa.h"

namespace bnb::cpu::avx512_bf16 {

const Kernels* kernel_table() {
  static const Kernels table = [] {
    Kernels kernels = *avx512::kernel_table();
    kernels.isa = "avx512_bf16";
    kernels.gemm_4bit_space = gemm_4bit_space;
    kernels.gemm_4bit_stage = gemm_4bit_stage;
    kernels.gemm_4bit = gemm_4bit;
    kernels.gemm_4bit_dgrad_space = gemm_4bit_dgrad_space;
    kernels.gemm_4bit_dgrad_stage = gemm_4bit_dgrad_stage;
    kernels.gemm_4bit_dgrad = gemm_4bit_dgrad;
    return kernels;
  }();
  return &table;
}

}  // namespace bnb::cpu::avx512_bf16
