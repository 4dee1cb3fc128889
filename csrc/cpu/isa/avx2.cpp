// The CPU kernels for x86-64 with AVX2, FMA and F16C.
// SPDX-License-Identifier: MIT
#include "cpu/simd/avx2.h"

#define BNB_ISA avx2
#include "cpu/kernels.inl"
