// The CPU kernels for x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI.
// SPDX-License-Identifier: MIT
#include "cpu/simd/avx512.h"

#define BNB_ISA avx512
#include "cpu/kernels.inl"
