// CUDA's device functions, as far as kernels here use them. Those whose result is approximate on a
// GPU (rsqrtf, __expf, ...) are absent on purpose: they would not give the same bits.
#pragma once
#include "machine.h"

// ---- barriers and warp operations

inline void __syncthreads(cuda_host::Site site = cuda_host::Site::here()) { cuda_host::block_barrier(false, site); }
inline int __syncthreads_count(int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  return cuda_host::block_barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  return cuda_host::block_barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  return cuda_host::block_barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(uint32_t mask = ~0u, cuda_host::Site site = cuda_host::Site::here()) {
  cuda_host::warp_barrier(mask, site);
}

namespace cuda_host {

// What a shuffle gives: the value of lane `source`, or one's own where that lies outside the
// segment.
template <typename T>
T shuffle(uint32_t mask, T value, int source, bool in_segment, const char* operation, Site site) {
  const Exchange lanes = warp_exchange(mask, to_bits(value), operation, site);
  if (!in_segment) return value;
  if (!(lanes.present >> source & 1))
    fail("%s at %s:%d reads lane %d, which did not take part", operation, site.file, site.line, source);
  return from_bits<T>(lanes.value[source]);
}

}  // namespace cuda_host

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, cuda_host::Site site = cuda_host::Site::here()) {
  const int segment = cuda_host::lane_id() & ~(width - 1);
  return cuda_host::shuffle(mask, value, segment | (source & (width - 1)), true, "__shfl_sync()", site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, cuda_host::Site site = cuda_host::Site::here()) {
  const int lane = cuda_host::lane_id(), source = lane ^ bits;
  return cuda_host::shuffle(mask, value, source, source / width <= lane / width, "__shfl_xor_sync()", site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   cuda_host::Site site = cuda_host::Site::here()) {
  const int lane = cuda_host::lane_id(), source = lane + int(delta);
  return cuda_host::shuffle(mask, value, source, source / width == lane / width, "__shfl_down_sync()", site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 cuda_host::Site site = cuda_host::Site::here()) {
  const int lane = cuda_host::lane_id(), source = lane - int(delta);
  return cuda_host::shuffle(mask, value, source, source >= 0 && source / width == lane / width, "__shfl_up_sync()",
                            site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  const auto lanes = cuda_host::warp_exchange(mask, predicate != 0, "a vote", site);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes.present >> lane & 1 && lanes.value[lane]) votes |= 1u << lane;
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, cuda_host::Site site = cuda_host::Site::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

// ---- atomics and fences: the builtins tell the sanitizers that these accesses are atomic

namespace cuda_host {

template <typename T>
struct Same {  // keeps an argument out of template deduction
  using Type = T;
};

template <typename T, typename Operation>
T atomic_update(T* address, Operation operation) {
  check_alignment(address);
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);  // no other thread runs until this one waits
  T next = operation(old);
  __atomic_store(address, &next, __ATOMIC_RELAXED);
  return old;
}

}  // namespace cuda_host

#define CUDA_HOST_ATOMIC(name, expression)                                            \
  template <typename T>                                                               \
  T name(T* address, typename cuda_host::Same<T>::Type value) {                       \
    return cuda_host::atomic_update(address, [&](T old) -> T { return expression; }); \
  }
CUDA_HOST_ATOMIC(atomicAdd, old + value)
CUDA_HOST_ATOMIC(atomicSub, old - value)
CUDA_HOST_ATOMIC(atomicExch, (void(old), value))
CUDA_HOST_ATOMIC(atomicMin, value < old ? value : old)
CUDA_HOST_ATOMIC(atomicMax, old < value ? value : old)
CUDA_HOST_ATOMIC(atomicAnd, (old & value))
CUDA_HOST_ATOMIC(atomicOr, old | value)
CUDA_HOST_ATOMIC(atomicXor, old ^ value)
CUDA_HOST_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_HOST_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_HOST_ATOMIC

template <typename T>
T atomicCAS(T* address, typename cuda_host::Same<T>::Type expected, typename cuda_host::Same<T>::Type desired) {
  return cuda_host::atomic_update(address, [&](T old) { return old == expected ? desired : old; });
}

inline void __threadfence_block() { cuda_host::fence(); }
inline void __threadfence() { cuda_host::fence(); }

// ---- loads and stores with a cache hint: what a hint changes, no test can see

#define CUDA_HOST_LOAD(name)             \
  template <typename T>                  \
  T name(const T* address) {             \
    cuda_host::check_alignment(address); \
    return *address;                     \
  }
CUDA_HOST_LOAD(__ldg)
CUDA_HOST_LOAD(__ldca)
CUDA_HOST_LOAD(__ldcg)
CUDA_HOST_LOAD(__ldcs)
CUDA_HOST_LOAD(__ldlu)
CUDA_HOST_LOAD(__ldcv)
#undef CUDA_HOST_LOAD

#define CUDA_HOST_STORE(name)                                      \
  template <typename T>                                            \
  void name(T* address, typename cuda_host::Same<T>::Type value) { \
    cuda_host::check_alignment(address);                           \
    *address = value;                                              \
  }
CUDA_HOST_STORE(__stwb)
CUDA_HOST_STORE(__stcg)
CUDA_HOST_STORE(__stcs)
CUDA_HOST_STORE(__stwt)
#undef CUDA_HOST_STORE

// ---- arithmetic that rounds as it does on a GPU, and bits

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

#define CUDA_HOST_MIN_MAX(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }

#define CUDA_HOST_REINTERPRET(name, From, To) \
  inline To name(From value) { return cuda_host::from_bits<To>(cuda_host::to_bits(value)); }
CUDA_HOST_REINTERPRET(__float_as_uint, float, unsigned)
CUDA_HOST_REINTERPRET(__float_as_int, float, int)
CUDA_HOST_REINTERPRET(__uint_as_float, unsigned, float)
CUDA_HOST_REINTERPRET(__int_as_float, int, float)
CUDA_HOST_REINTERPRET(__double_as_longlong, double, long long)
CUDA_HOST_REINTERPRET(__longlong_as_double, long long, double)
#undef CUDA_HOST_REINTERPRET

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(static_cast<unsigned long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---- the runtime API's overloads for kernels, which cuda_runtime.h has for nvcc only

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
