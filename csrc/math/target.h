// Every instruction set is compiled into a namespace of its own: an inline function of one shared namespace would be
// merged by the linker, and an old CPU could be handed the AVX-512 copy.
#pragma once

#ifndef FUSEDOPT_TARGET
#define FUSEDOPT_TARGET generic
#endif

#if defined(__CUDACC__) || defined(CUDA_HOST_SHIM)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// For what runs once per element: a call, or an array passed through memory, would cost more than the arithmetic.
#define FUSEDOPT_INLINE inline __attribute__((always_inline))
