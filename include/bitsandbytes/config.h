// Macros that let one header serve the host compiler, nvcc and clang's HIP mode.
// SPDX-License-Identifier: MIT
#pragma once

#if defined(__CUDACC__) || defined(__HIP__)
#define BNB_HD __host__ __device__ inline __attribute__((always_inline))
#else
#define BNB_HD inline __attribute__((always_inline))
#endif
