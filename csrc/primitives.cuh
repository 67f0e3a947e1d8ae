// What the kernels ask of the hardware, and nothing else: PTX here, the same names for a CPU in emulator/primitives.h.
//
// A kernel is written against these names only, so the very source that nvcc compiles for a GPU is run by the tests on
// a machine without one.
#pragma once

#ifdef ASYMVLM_EMULATE
#include "emulator/primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GRID_CONSTANT const __grid_constant__

namespace asymvlm {

struct Half {  // fp16
  static constexpr bool LIFTED = true;  // t' is lifted by a power of two: its low part would underflow
  uint16_t bits;
};
struct Bfloat {  // bf16
  static constexpr bool LIFTED = false;
  uint16_t bits;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool HAS_BULK = true;  // cp.async.bulk, mbarriers that count bytes
#else
constexpr bool HAS_BULK = false;
#endif

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }

DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char asymvlm_shared[];
  return asymvlm_shared;
}

DEVICE void block_sync() { __syncthreads(); }
DEVICE bool block_any(bool value) { return __syncthreads_or(value); }

template <class V>
DEVICE V shuffle(V value, int lane) { return __shfl_sync(~0u, value, lane); }
template <class V>
DEVICE V shuffle_xor(V value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
template <class V>
DEVICE V shuffle_up(V value, int lanes) { return __shfl_up_sync(~0u, value, lanes); }
DEVICE uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }
DEVICE uint32_t match_any(uint32_t value) { return __match_any_sync(~0u, value); }
DEVICE int warp_sum(int value) { return __reduce_add_sync(~0u, value); }
DEVICE int count_bits(uint32_t value) { return __popc(value); }
DEVICE int first_bit(uint32_t value) { return __ffs(value) - 1; }

DEVICE int shared_add(int* address, int value) { return atomicAdd(address, value); }

// From L2, where other blocks wrote it.
template <class V>
DEVICE V load_l2(const V* address) { return __ldcg(address); }

// Counters in device memory. `arrive` makes what its block wrote before visible to whoever waits for it.
DEVICE int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE void wait_for(const int* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DEVICE float root(float value) { return __fsqrt_rn(value); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float power_2(float value) { return exp2f(value); }
DEVICE float logarithm_2(float value) { return log2f(value); }
// never fused into a multiply-add: PyTorch rounds twice
DEVICE double multiply_f64(double a, double b) { return __dmul_rn(a, b); }
DEVICE double add_f64(double a, double b) { return __dadd_rn(a, b); }
DEVICE long long nearest_integer(double value) { return __double2ll_rn(value); }

DEVICE float low_float(Bfloat, uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_float(Bfloat, uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float low_float(Half, uint32_t pair) { return __half2float(__ushort_as_half((unsigned short)pair)); }
DEVICE float high_float(Half, uint32_t pair) { return __half2float(__ushort_as_half((unsigned short)(pair >> 16))); }
DEVICE uint32_t pack(Bfloat, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t pack(Half, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8) of one warp, in the layout of mma.m16n8k16.
DEVICE void multiply_tile(Bfloat, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_tile(Half, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Barriers in shared memory that asynchronous copies arrive at. One phase after the other; `parity` is that of a phase.
DEVICE uint32_t shared_address(const void* address) { return (uint32_t)__cvta_generic_to_shared(address); }
DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_done() {  // before the asynchronous proxy may see them
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive_for_bytes(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
  } while (!done);
}

// Copies of 16 bytes by each thread; `arrive_async` arrives once those that the thread has issued are there.
DEVICE void load_async_16(void* to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
DEVICE void arrive_async(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Copies of a whole row by one thread: multiples of 16 bytes.
DEVICE void load_bulk(void* to_shared, const void* from, int bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to_shared)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#endif
}
DEVICE void store_bulk(void* to, const void* from_shared, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(to), "r"(shared_address(from_shared)), "r"(bytes) : "memory");
#endif
}
DEVICE void store_bulk_wait() {  // for all that this thread has stored
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// Blocks of one cluster: all threads of all of them meet, and see what the others wrote to their shared memory.
DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
template <class V>
DEVICE const V* cluster_address(const V* address, int rank) {  // the same place in the shared memory of block `rank`
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((uint64_t)address), "r"(rank));
  return (const V*)there;
#else
  return address;
#endif
}

}  // namespace asymvlm
#endif
