// Hopper's instructions behind names: warpgroup products, barriers of transactions, bulk copies.
// For targets with BNB_HOPPER only (sm_90a).
// SPDX-License-Identifier: MIT
//
// A warpgroup is four consecutive warps of which the first has a number divisible by four. It
// multiplies A [64, 16] in registers by B [16, n] in shared memory into float sums in registers.
// Warp w of it holds rows 16 w to 16 w + 15; with lane = 4 g + t (PTX ISA, "Register Fragments for
// wgmma.mma_async.m64nNk16"):
//
//     a[0], a[1]     A[g][2t, 2t+1],   A[g+8][2t, 2t+1]
//     a[2], a[3]     A[g][2t+8, 2t+9], A[g+8][2t+8, 2t+9]
//     d[4j], d[4j+1]     D[g][8j+2t, 8j+2t+1]
//     d[4j+2], d[4j+3]   D[g+8][8j+2t, 8j+2t+1]
//
// A run of products is
//
//     wgmma_fence();  // registers written by other instructions are in place
//     Wgmma<T, n>::run(d, a, b, accumulate); ...
//     wgmma_commit();
//     wgmma_wait<open>(); wgmma_hold(d);  // all committed runs but the last `open` have ended
//
// and neither d nor a may be touched from run() to the end of the wait.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bitsandbytes/numeric.h"
#include "gpu/runtime/runtime.cuh"

#if BNB_HOPPER

namespace bnb::gpu {

// ---- Shared memory as these instructions name it ---------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Tiles of B lie in rows of 128 bytes: 64 elements of k for one column n. Groups of eight rows
// begin on multiples of 1024 bytes, and their 16-byte chunks are permuted so that eight rows of one
// chunk lie in different banks ("128-byte swizzle").
inline constexpr int kSwizzleRow = 128;

// The place of 16-byte chunk `chunk` (0 to 7) of row `row`, in bytes from the tile's start.
__host__ __device__ __forceinline__ constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kSwizzleRow + ((chunk ^ (row & 7u)) << 4);
}

// Descriptor of 16 elements of k, from chunk 2 s on, of a tile that begins at `tile` (a multiple of
// 1024): K is the inner dimension, groups of eight rows follow each other.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t tile) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  constexpr uint32_t kGroupStride = 8 * kSwizzleRow >> 4;
  constexpr uint32_t kUnused = 1u << 16;  // leading dimension: one atom wide
  return static_cast<uint64_t>(kSwizzle128 | kGroupStride) << 32 | kUnused | (tile & 0x3ffffu) >> 4;
}
// The address, in the lower word, never carries.
__device__ __forceinline__ uint64_t advance_k(uint64_t descriptor, int s) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(s * (32 >> 4));
  return (descriptor & 0xffffffff00000000u) | low;
}

// ---- Warpgroup products -----------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Keeps the compiler from moving uses of registers over this place.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_hold(int (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_hold(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Makes of an integer, in its register, the bits of x * scale as a float. In C++ the sums of a
// whole tile would take twice as many registers meanwhile.
__device__ __forceinline__ void scale_in_place(int& x, float scale) {
  asm volatile("{.reg .f32 y; cvt.rn.f32.s32 y, %0; mul.rn.f32 y, y, %1; mov.b32 %0, y;}"
               : "+r"(x)
               : "f"(scale));
}

// d = a b, plus d where `accumulate`. T is BFloat16 or Half, n is kN.
template <class T, int kN>
struct Wgmma;

// Operands of the instruction, as text and as constraints: n/2 floats d[first], d[first + 1] ...
#define BNB_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define BNB_D16(i) BNB_D8(i), BNB_D8(i + 8)
#define BNB_D32(i) BNB_D16(i), BNB_D16(i + 16)
#define BNB_D48(i) BNB_D32(i), BNB_D16(i + 32)
#define BNB_D64(i) BNB_D32(i), BNB_D32(i + 32)
#define BNB_D96(i) BNB_D64(i), BNB_D32(i + 64)
#define BNB_D128(i) BNB_D64(i), BNB_D64(i + 64)
#define BNB_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define BNB_NAMES16 BNB_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define BNB_NAMES32 BNB_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BNB_NAMES48 BNB_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define BNB_NAMES64 BNB_NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BNB_NAMES96                                                                  \
  BNB_NAMES64                                                                        \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83" \
  ",%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define BNB_NAMES128                                                                  \
  BNB_NAMES96                                                                         \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112" \
  ",%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// One instruction. A0 to ACC: the numbers of the operands after d.
#define BNB_WGMMA(TYPE, NAME, N, COUNT, A0, A1, A2, A3, B, ACC)                           \
  template <>                                                                             \
  struct Wgmma<TYPE, N> {                                                                 \
    static constexpr int kSums = COUNT;                                                   \
    __device__ __forceinline__ static void run(float (&d)[COUNT], const uint32_t (&a)[4], \
                                               uint64_t b, bool accumulate) {             \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ACC                                 \
                   ", 0;\n"                                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME        \
                   " {" BNB_NAMES##COUNT "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B \
                                         ", p, 1, 1, 0;}"                                 \
                   : BNB_D##COUNT(0)                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                  \
                     "r"(static_cast<int>(accumulate)));                                  \
    }                                                                                     \
  }

#define BNB_WGMMAS(TYPE, NAME)                              \
  BNB_WGMMA(TYPE, NAME, 16, 8, 8, 9, 10, 11, 12, 13);       \
  BNB_WGMMA(TYPE, NAME, 32, 16, 16, 17, 18, 19, 20, 21);    \
  BNB_WGMMA(TYPE, NAME, 64, 32, 32, 33, 34, 35, 36, 37);    \
  BNB_WGMMA(TYPE, NAME, 96, 48, 48, 49, 50, 51, 52, 53);    \
  BNB_WGMMA(TYPE, NAME, 128, 64, 64, 65, 66, 67, 68, 69);   \
  BNB_WGMMA(TYPE, NAME, 192, 96, 96, 97, 98, 99, 100, 101); \
  BNB_WGMMA(TYPE, NAME, 256, 128, 128, 129, 130, 131, 132, 133)

BNB_WGMMAS(BFloat16, "bf16");
BNB_WGMMAS(Half, "f16");

// ---- Products of two operands in shared memory ------------------------------------------------

// d = a b, plus d where `accumulate`; A [64, 32 bytes of k] and B [n, 32 bytes of k] by
// descriptors, both with K as the inner dimension. Integers in 32 bits, exact, without saturation.
// Of 16-bit operands d are floats, or the bits of floats, whose registers can have been integers.
template <int kN>
struct WgmmaInt8;
template <class T, int kN>
struct WgmmaShared;

#define BNB_I8(i)                                                                             \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define BNB_I16(i) BNB_I8(i), BNB_I8(i + 8)
#define BNB_I32(i) BNB_I16(i), BNB_I16(i + 16)
#define BNB_I64(i) BNB_I32(i), BNB_I32(i + 32)
#define BNB_I128(i) BNB_I64(i), BNB_I64(i + 64)

// A, B, ACC: the numbers of the operands after d.
#define BNB_WGMMA_SHARED(NAME, SUM, OPERANDS, IMMEDIATES, N, COUNT, A, B, ACC)       \
  __device__ __forceinline__ static void run(SUM(&d)[COUNT], uint64_t a, uint64_t b, \
                                             bool accumulate) {                      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #ACC                              \
                 ", 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #N NAME " {" BNB_NAMES##COUNT   \
                 "}, %" #A ", %" #B ", p" IMMEDIATES ";}"                            \
                 : OPERANDS##COUNT(0)                                                \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));               \
  }
#define BNB_WGMMAS_SHARED(N, COUNT, A, B, ACC)                                               \
  template <>                                                                                \
  struct WgmmaInt8<N> {                                                                      \
    BNB_WGMMA_SHARED("k32.s32.s8.s8", int, BNB_I, "", N, COUNT, A, B, ACC)                   \
  };                                                                                         \
  template <>                                                                                \
  struct WgmmaShared<BFloat16, N> {                                                          \
    BNB_WGMMA_SHARED("k16.f32.bf16.bf16", float, BNB_D, ", 1, 1, 0, 0", N, COUNT, A, B, ACC) \
    BNB_WGMMA_SHARED("k16.f32.bf16.bf16", int, BNB_I, ", 1, 1, 0, 0", N, COUNT, A, B, ACC)   \
  };                                                                                         \
  template <>                                                                                \
  struct WgmmaShared<Half, N> {                                                              \
    BNB_WGMMA_SHARED("k16.f32.f16.f16", float, BNB_D, ", 1, 1, 0, 0", N, COUNT, A, B, ACC)   \
    BNB_WGMMA_SHARED("k16.f32.f16.f16", int, BNB_I, ", 1, 1, 0, 0", N, COUNT, A, B, ACC)     \
  }

BNB_WGMMAS_SHARED(16, 8, 8, 9, 10);
BNB_WGMMAS_SHARED(32, 16, 16, 17, 18);
BNB_WGMMAS_SHARED(64, 32, 32, 33, 34);
BNB_WGMMAS_SHARED(128, 64, 64, 65, 66);
BNB_WGMMAS_SHARED(256, 128, 128, 129, 130);

#undef BNB_WGMMAS_SHARED
#undef BNB_WGMMA_SHARED
#undef BNB_I128
#undef BNB_I64
#undef BNB_I32
#undef BNB_I16
#undef BNB_I8
#undef BNB_WGMMAS
#undef BNB_WGMMA
#undef BNB_NAMES128
#undef BNB_NAMES96
#undef BNB_NAMES64
#undef BNB_NAMES48
#undef BNB_NAMES32
#undef BNB_NAMES16
#undef BNB_NAMES8
#undef BNB_D128
#undef BNB_D96
#undef BNB_D64
#undef BNB_D48
#undef BNB_D32
#undef BNB_D16
#undef BNB_D8

// ---- Registers and barriers -------------------------------------------------------------------

// Moves registers between warpgroups; all warps of one call it. kCount is a multiple of 8.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier of some whole warps of the block; number 0 is that of __syncthreads().
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Makes stores to shared memory visible to wgmma and bulk copies: in each thread that stored,
// before the barrier.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for the end of a phase of this parity of the barrier at `address`. What others did before
// they arrived is visible if they are of this block.
__device__ __forceinline__ void wait_for_phase(uint32_t address, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(address),
      "r"(parity)
      : "memory");
}

// A barrier in shared memory (mbarrier), by its address. A phase ends when `arrivals` have arrived
// and all bytes that were announced have come; phases have parity 0, 1, 0 ...
struct BarrierAt {
  uint32_t address;

  __device__ __forceinline__ void init(int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }
  // Arrives at the same barrier of another block of the cluster. That tells it what has been read
  // here, not what has been written.
  __device__ __forceinline__ void arrive_at(int block) const {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(address),
        "r"(block)
        : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
  }
  // Arrives when all copies that this thread started with start_copy() have ended.
  __device__ __forceinline__ void arrive_after_copies() const {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address) : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) const { wait_for_phase(address, parity); }
};

// The same as a variable in shared memory.
struct TransactionBarrier {
  uint64_t state;

  __device__ __forceinline__ BarrierAt at() { return {shared_address(&state)}; }
  __device__ __forceinline__ void init(int arrivals) { at().init(arrivals); }
  __device__ __forceinline__ void arrive() { at().arrive(); }
  __device__ __forceinline__ void arrive_at(int block) { at().arrive_at(block); }
  __device__ __forceinline__ void arrive_and_expect(int bytes) { at().arrive_and_expect(bytes); }
  __device__ __forceinline__ void arrive_after_copies() { at().arrive_after_copies(); }
  __device__ __forceinline__ void wait(uint32_t parity) { at().wait(parity); }
};

// ---- Rings of stages in shared memory ----------------------------------------------------------

// Of a stage.
struct RingBarriers {
  TransactionBarrier full;   // what the stage holds is there
  TransactionBarrier empty;  // all who read them have done so
};

// A place in the ring, and how often it has been there.
template <int kStages>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void advance(int count) {
    slot += count;
    phase ^= static_cast<uint32_t>(slot / kStages) & 1u;
    slot %= kStages;
  }
};

// After init() and before the barrier that lets others use it.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// start_copy() to an address.
template <int kBytes>
__device__ __forceinline__ void start_copy_at(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(kBytes)
               : "memory");
}

// ---- Bulk copies ------------------------------------------------------------------------------

// Starts a copy of `bytes` (a multiple of 16, like both addresses) that counts at `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, int bytes,
                                          BarrierAt barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier.address)
      : "memory");
}

// ---- Shared memory by address -----------------------------------------------------------------

__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// ---- Clusters ---------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of all threads of the cluster, and its two halves.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}
// The same without order of memory, so that nobody waits for stores: blocks only stay until all
// have come.
__device__ __forceinline__ void cluster_stay() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                   : "memory");
}

// ---- Conversions ------------------------------------------------------------------------------

// Two floats in 16 bits each, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16_pair(low, high);
  } else {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
  }
}

// ---- Stores of transposed tiles ---------------------------------------------------------------

// Stores four 8 x 8 matrices of 16-bit elements, transposed: lane 4 g + t holds row g, columns 2 t
// and 2 t + 1 of matrix i in words[i]; lane 8 i + c names the place, of 16 bytes, of column c.
__device__ __forceinline__ void store_transposed(uint32_t place, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// ---- Counters ---------------------------------------------------------------------------------

// Sets a flag; what this thread, and others that it has synchronised with, stored is visible to who
// sees it. Waits until a flag is set to a value.
__device__ __forceinline__ void set_flag(unsigned long long* flag, unsigned long long value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ void wait_for_flag(const unsigned long long* flag,
                                              unsigned long long value) {
  unsigned long long seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

}  // namespace bnb::gpu

#endif  // BNB_HOPPER
