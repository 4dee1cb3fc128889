// The GPU vendor's runtime under CUDA's names, and a few functions that vendors spell differently.
// The only file with conditions on the vendor.
//
// Everything works on warps: groups of kWarp = 32 lanes, which are a warp on NVIDIA and on AMD's
// RDNA, half of a wavefront on CDNA.
//
//   shuffle_xor(value, mask)        the value of lane `own ^ mask`
//   warp_max, warp_all, warp_ballot reductions over a warp; one bit per lane
//   block_all(condition)            a barrier; whether the condition holds for all threads
//   start_copy<bytes>(to, from)     a copy to shared memory that runs while the thread goes on; it
//                                   joins the open group
//   close_copy_group()              closes that group
//   wait_copies<n>()                waits for all closed groups but the last n; only what the same
//                                   thread copied is then sure to be there
//   kLaneTables                     whether there may be kernels with BNB_LANE_TABLES
//   shared_pointer(p), shared_word(s)   p in shared memory as a SharedPointer s; a word there that
//                                   no longer changes
//   gap_to_second_byte(s)           bytes to the next multiple of kSecondByte
//   with_second_byte(s, word, i)    s, a multiple of kSecondByte and less than 256 more, moved on
//   by
//                                   256 times byte i of word
//   absmax_step(most, x)            max(most, |x|) in which NaN wins
//   max_magnitudes<T>(most, pair)   the larger of both magnitudes, for two 16-bit floats in a word,
//                                   with any signs; NaN wins
//   byte_signs(a, b, selector)      0xff for each of the four bytes that the selector takes as
//                                   byte_permute() does whose highest bit is set, 0 for the others
//   hide_origin(x)                  x, a pointer or a number in a register, of which the compiler
//                                   no longer knows where it comes from
//   approximate_reciprocal, approximate_sqrt    one instruction, within 2 units in the last place
//   kTensorProducts                 whether there is what follows
//   has_tensor_products()           whether the current device has instructions for it
//   multiply_add_16x8x16<T>(c, a, b0, b1)
//                                   c += a b for matrices [16, 8], [16, 16] and [16, 8] that lie in
//                                   a warp as PTX's mma.m16n8k16 has them: lane 4 g + t has of a
//                                   rows g and g + 8, columns 2 t + {0, 1} and 2 t + {8, 9}; of b
//                                   rows of these numbers, column g
//   prefetch_to_cache(p)            reads the kCacheLine bytes around p into the cache that all
//                                   multiprocessors share
//   start_kernel_early(...)         start_kernel(), but the kernel may start before the one before
//                                   it in the stream has ended, where that allows it
//   let_next_kernel_start()         allows it: as soon as all blocks have called it, or ended
//   wait_for_previous_kernel()      waits for the end of the kernel before, and for its stores;
//                                   without an early start there is nothing to wait for
//   sync_warp()                     a barrier of the lanes of a warp, all of which reach it
//   SplitBarrier                    a barrier in shared memory whose halves are apart: after
//                                   init(n) and a barrier of the block, a phase ends when n have
//                                   called arrive(); wait(p) waits while the present phase has
//                                   parity p; phases have parity 0, 1, 0 ...
//   BNB_GRID_CONSTANT               kernel parameters that are read in place
//   BNB_LAUNCH_BOUNDS(threads, blocks)   of a block; of blocks that shall fit a multiprocessor
//   BNB_DYNAMIC_SHARED(name)        declares the shared memory that the launch asked for
//   BNB_KERNEL_ARGUMENT_BYTES       what a launch may pass to a kernel
//   BNB_BULK_COPIES                 1 where the host can describe tiles to the copy engine: in
//                                   CUDA
//   BNB_HOPPER                      1 where kernels may have the instructions of sm_90a: in CUDA's
//                                   pass for the host, and in that for this target
//   BNB_LANE_TABLES                 1 where kernels may take some 200 KB of shared memory: there,
//                                   and in the emulation
// SPDX-License-Identifier: MIT
#pragma once

#if defined(BNB_GPU_EMULATED)
#include "gpu/runtime/emulated.cuh"
#elif defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#include "gpu/runtime/hip.cuh"
#else
#include "gpu/runtime/cuda.cuh"
#endif

#include <cstdint>

#include "bitsandbytes/numeric.h"

namespace bnb::gpu {

inline constexpr int kCacheLine = 128;  // bytes

// Whether quick_reciprocal() serves a positive float of these bits: neither it nor its reciprocal
// is near the ends of the range.
__device__ __forceinline__ bool has_quick_reciprocal(uint32_t bits) {
  return bits - 0x02000000u < 0x7a000000u;
}

// The correctly rounded reciprocal: one Newton step from an approximation within one unit in the
// last place, its error taken with a fused multiply-add (Markstein 1990).
__device__ __forceinline__ float quick_reciprocal(float x) {
  const float y = approximate_reciprocal(x);
  return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

}  // namespace bnb::gpu
