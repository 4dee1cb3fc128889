// Hopper's copies of tiles of a matrix into shared memory, and what moves between the shared
// memories of a cluster.
// SPDX-License-Identifier: MIT
//
// A TensorMap describes a matrix in global memory and the tile that one copy takes. What of a tile
// lies outside the matrix arrives as zeros. It is an argument of the kernel by value, in place
// (BNB_GRID_CONSTANT).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu/device/wgmma.cuh"
#include "gpu/runtime/check.h"

namespace bnb::gpu {

// ---- On the host -------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// How the 16-byte chunks of a tile's rows are permuted: within rows of 64 or 128 bytes, so that
// eight rows of one chunk lie in different banks.
enum class Swizzle {
  kNone = CU_TENSOR_MAP_SWIZZLE_NONE,
  k64 = CU_TENSOR_MAP_SWIZZLE_64B,
  k128 = CU_TENSOR_MAP_SWIZZLE_128B
};

// The driver's function, which the runtime library finds: nothing is linked against the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    BNB_GPU_CHECK(find_driver_function("cuTensorMapEncodeTiled", &function));
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

// A matrix [rows, row_bytes] whose rows follow each other, in tiles of [tile_rows, tile_bytes]. Its
// address, row_bytes and tile_bytes are multiples of 16; so must be the byte at which a copy
// begins.
inline TensorMap tensor_map(const void* matrix, int64_t rows, int64_t row_bytes, int tile_rows,
                            int tile_bytes, Swizzle swizzle,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B) {
  constexpr cuuint32_t kElement = 2;  // bytes; what they mean does not matter
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(row_bytes) / kElement,
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t tile[] = {static_cast<cuuint32_t>(tile_bytes) / kElement,
                             static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(matrix), sizes, strides, tile,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle), promotion,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with status " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}
// In tiles as wide as the swizzle.
inline TensorMap tensor_map(const void* matrix, int64_t rows, int64_t row_bytes, int tile_rows,
                            Swizzle swizzle) {
  return tensor_map(matrix, rows, row_bytes, tile_rows, swizzle == Swizzle::k128 ? 128 : 64,
                    swizzle);
}

// Whether the current device has the instructions of sm_90a.
inline bool is_hopper() {
  int device = 0;
  int major = 0;
  int minor = 0;
  BNB_GPU_CHECK(cudaGetDevice(&device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  BNB_GPU_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

// Whether what was built has `kernel` for them. Its shared memory tells: for other targets kernels
// are empty.
inline bool is_built(const void* kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();
  return status == cudaSuccess && attributes.sharedSizeBytes > 0;
}

// ---- In kernels --------------------------------------------------------------------------------

#if BNB_HOPPER

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts a copy of the tile that begins at row `row` and 16-bit column `column`; counts at
// `barrier`.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const TensorMap& map, int column,
                                            int row, BarrierAt barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier.address)
      : "memory");
}
__device__ __forceinline__ void tensor_copy(uint32_t shared, const TensorMap& map, int column,
                                            int row, TransactionBarrier& barrier) {
  tensor_copy(shared, map, column, row, barrier.at());
}

// Starts a copy of a tile from shared memory to the matrix: what of it lies outside is left out.
// What this thread starts between two calls of end_stores() is a group.
__device__ __forceinline__ void tensor_store(const TensorMap& map, int column, int row,
                                             uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(shared)
      : "memory");
}
__device__ __forceinline__ void end_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all but the last `open` groups have read shared memory.
template <int kOpen>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}

// The same to the same place in every block of the cluster whose bit is set in `blocks`; counts at
// the barrier of each.
__device__ __forceinline__ void tensor_copy_to_cluster(uint32_t shared, const TensorMap& map,
                                                       int column, int row, BarrierAt barrier,
                                                       uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier.address), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void tensor_copy_to_cluster(uint32_t shared, const TensorMap& map,
                                                       int column, int row,
                                                       TransactionBarrier& barrier,
                                                       uint16_t blocks) {
  tensor_copy_to_cluster(shared, map, column, row, barrier.at(), blocks);
}

// The address in the cluster of what lies at `shared` in its block `block`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, int block) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(block));
  return there;
}

__device__ __forceinline__ uint4 load_in_cluster(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_word_in_cluster(uint32_t address, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void add_in_cluster(uint32_t address, uint32_t x) {
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(address), "r"(x)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed: lane l names row l % 8 of matrix l / 8, and
// lane 4 g + t gets elements [2t][g] and [2t + 1][g] of each.
__device__ __forceinline__ void load_transposed(uint32_t row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

#endif  // BNB_HOPPER

}  // namespace bnb::gpu
