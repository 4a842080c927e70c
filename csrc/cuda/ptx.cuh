// Instructions that CUDA C++ has no function for, each behind one of its own. All exist from sm_80
// on. Their twins for the host stand in tests/cuda_host/ptx_twin.h.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#ifdef CUDA_HOST_SHIM
#include "ptx_twin.h"
#else

namespace fusedopt {

// ---- tensor cores

// d += a b for a 16x16, b 16x8 and d 16x8, spread over a warp. With lane = 4 g + t, and two 16-bit
// numbers in a register, the lower in its low half:
//   a[0] row g,   columns 2t, 2t+1      a[2] row g,   columns 2t+8, 2t+9
//   a[1] row g+8, columns 2t, 2t+1      a[3] row g+8, columns 2t+8, 2t+9
//   b[0] column g, rows 2t, 2t+1        b[1] column g, rows 2t+8, 2t+9
//   d[0], d[1] row g, columns 2t, 2t+1  d[2], d[3] row g+8, columns 2t, 2t+1
// Products are exact, sums are fp32 and rounded toward zero.
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two numbers rounded to nearest even, the first in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

__device__ inline float unpack_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane l names row l % 8 of matrix l / 8,
// 16 aligned bytes; register i of lane 4 g + t then holds row g, columns 2t and 2t+1 of matrix i.
// The transposed form gives column g, rows 2t and 2t+1.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- asynchronous copies

// Starts a copy of 16 aligned bytes to shared memory; of these, the last 16 - bytes become zero and
// are not read. What lies at `to` is undefined until a wait of this thread has covered the copy.
__device__ inline void cp_async_16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
// Makes a group of this thread's copies since the last commit (it may be empty).
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the kPending latest groups have landed, for this thread; others need a
// barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- 16-byte accesses to global memory that is touched once

// Not for memory that this kernel writes: the load takes a path that is not kept coherent.
__device__ inline uint4 ld_global_nc_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from)));
  return v;
}
__device__ inline uint4 ld_global_cs_16(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }
__device__ inline void st_global_cs_16(void* to, uint4 v) { __stcs(static_cast<uint4*>(to), v); }
// Asks for the line at `from` without waiting for it.
__device__ inline void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// ---- order between thread blocks

__device__ inline void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline uint32_t atomic_add_release(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
  return before;
}
__device__ inline void store_release(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(value) : "memory");
}
__device__ inline uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(word)) : "memory");
  return value;
}

// Spins while (*word & mask) == value; returns *word. Who is waited for must be running already.
__device__ inline uint32_t wait_while_equal(const uint32_t* word, uint32_t mask, uint32_t value) {
  uint32_t now = load_acquire(word);
  for (; (now & mask) == value; now = load_acquire(word)) __nanosleep(32);
  return now;
}

}  // namespace fusedopt

#endif  // CUDA_HOST_SHIM
