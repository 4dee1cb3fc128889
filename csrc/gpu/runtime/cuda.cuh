// What CUDA has beyond its own names. Included by runtime.cuh, which says what each function does.
// SPDX-License-Identifier: MIT
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "bitsandbytes/numeric.h"

#define BNB_GRID_CONSTANT __grid_constant__
// Threads of a block, and blocks that shall fit a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
// A multiprocessor of Turing has room for 1024 threads: blocks are not counted on.
#define BNB_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)
#else
#define BNB_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif
// What CUDA 12.1 and later take from compute capability 7.0 on.
#define BNB_KERNEL_ARGUMENT_BYTES 32764
#define BNB_NOINLINE __noinline__
// Shared memory beyond the static one, as much as the launch asked for.
#define BNB_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define BNB_BULK_COPIES 1
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BNB_HOPPER 1
#else
#define BNB_HOPPER 0
#endif
#define BNB_LANE_TABLES BNB_HOPPER

namespace bnb::gpu {

inline constexpr int kDlpackDeviceType = 2;

#if CUDART_VERSION >= 13000

inline cudaError_t prefetch_to_device(const void* start, size_t bytes, int device,
                                      cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, {cudaMemLocationTypeDevice, device}, 0, stream);
}

inline cudaError_t prefetch_to_host(const void* start, size_t bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, {cudaMemLocationTypeHost, 0}, 0, stream);
}

#else

inline cudaError_t prefetch_to_device(const void* start, size_t bytes, int device,
                                      cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, device, stream);
}

inline cudaError_t prefetch_to_host(const void* start, size_t bytes, cudaStream_t stream) {
  return cudaMemPrefetchAsync(start, bytes, cudaCpuDeviceId, stream);
}

#endif

inline constexpr int kWarp = 32;

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask, kWarp);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = shuffle_xor(value, offset);
    value = other > value ? other : value;
  }
  return value;
#endif
}

__device__ __forceinline__ bool warp_all(bool condition) {
  return __all_sync(0xffffffffu, condition) != 0;
}

__device__ __forceinline__ uint32_t warp_ballot(bool condition) {
  return __ballot_sync(0xffffffffu, condition);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

__device__ __forceinline__ uint32_t byte_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector | 0x8888u));
  return y;
}

inline constexpr bool kLaneTables = true;
using SharedPointer = uint32_t;
inline constexpr int kSecondByte = 1 << 16;

__device__ __forceinline__ SharedPointer shared_pointer(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ int gap_to_second_byte(SharedPointer p) {
  return static_cast<int>((0u - p) & (kSecondByte - 1));
}
__device__ __forceinline__ SharedPointer with_second_byte(SharedPointer p, uint32_t word, int i) {
  return byte_permute(word, p, 0x7604u | (static_cast<uint32_t>(i) << 4));
}
__device__ __forceinline__ uint32_t shared_word(SharedPointer p) {
  uint32_t x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(p));
  return x;
}

__device__ __forceinline__ int dot4(int a, int b, int acc) { return __dp4a(a, b, acc); }

__device__ __forceinline__ int bits_set(uint32_t x) { return __popc(x); }

// The same, of which the compiler no longer knows where it comes from.
template <class T>
__device__ __forceinline__ const T* hide_origin(const T* p) {
  asm("" : "+l"(p));
  return p;
}
__device__ __forceinline__ uint32_t hide_origin(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float approximate_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(most, |x|) in which NaN wins.
__device__ __forceinline__ float absmax_step(float most, float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(most), "f"(fabsf(x)));
  return y;
#else
  return absmax_of(most, x);
#endif
}

template <class T>
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t most, uint32_t pair) {
#if __CUDA_ARCH__ >= 860
  uint32_t y;  // with a sign
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(most), "r"(pair));
  } else {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(y) : "r"(most), "r"(pair));
  }
  return y;
#elif __CUDA_ARCH__ >= 800
  uint32_t y;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("{.reg .b32 m; abs.bf16x2 m, %2; max.NaN.bf16x2 %0, %1, m;}"
        : "=r"(y)
        : "r"(most), "r"(pair));
  } else {
    asm("{.reg .b32 m; abs.f16x2 m, %2; max.NaN.f16x2 %0, %1, m;}"
        : "=r"(y)
        : "r"(most), "r"(pair));
  }
  return y;
#else
  return max_halves(most & 0x7fff7fffu, pair & 0x7fff7fffu);
#endif
}

__device__ __forceinline__ uint16_t to_bfloat16_bits(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  return from_float<BFloat16>(x).bits;
#endif
}

__device__ __forceinline__ uint32_t to_bfloat16_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return to_bfloat16_bits(low) | (static_cast<uint32_t>(to_bfloat16_bits(high)) << 16);
#endif
}

// Copies to shared memory that run while the thread goes on: start_copy() adds to the open group,
// close_copy_group() closes it, wait_copies<n>() waits for all closed groups but the last n. Only
// what the same thread copied is then sure to be there.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  struct alignas(kBytes) Bytes {
    unsigned char bytes[kBytes];
  };
  *static_cast<Bytes*>(shared) = *static_cast<const Bytes*>(global);
#endif
}

__device__ __forceinline__ void close_copy_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kOpen>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

struct SplitBarrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
#endif
  }
  __device__ __forceinline__ void arrive() {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .b64 token; mbarrier.arrive.shared.b64 token, [%0];}" ::"r"(address())
                 : "memory");
#endif
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    // Lets other warps run meanwhile.
    asm volatile(
        "{.reg .pred over;\n"
        "again: mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n"
        "@!over bra again;}" ::"r"(address()),
        "r"(parity)
        : "memory");
#elif __CUDA_ARCH__ >= 800
    uint32_t over;
    do {
      asm volatile(
          "{.reg .pred over; mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;}"
          : "=r"(over)
          : "r"(address()), "r"(parity)
          : "memory");
    } while (over == 0);
#endif
  }

 private:
  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
  }
};

__device__ __forceinline__ bool block_all(bool condition) {
  return __syncthreads_and(condition) != 0;
}

inline constexpr bool kTensorProducts = true;

inline bool has_tensor_products() {
  constexpr int kAmpere = 8;
  int device = 0;
  int major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= kAmpere;
}

template <class T>
__device__ __forceinline__ void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  __trap();  // the host asks has_tensor_products()
#endif
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

// A function of the driver as CUDA 12.0 has it, without linking against the driver.
inline cudaError_t find_driver_function(const char* name, void** function) {
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found);
#else
  return cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found);
#endif
}

__device__ __forceinline__ void prefetch_to_cache(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class... Parameters, class... Arguments>
void start_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}

template <class... Parameters, class... Arguments>
void start_kernel_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  constexpr int kHopper = 9;
  int device = 0;
  int major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      major < kHopper) {
    return start_kernel(kernel, grid, block, shared_bytes, stream, arguments...);
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace bnb::gpu
