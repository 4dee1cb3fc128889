// The CPU kernels for any processor.
// SPDX-License-Identifier: MIT
#include "cpu/simd/baseline.h"

#define BNB_ISA baseline
#include "cpu/kernels.inl"
