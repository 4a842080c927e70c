// The arithmetic that formulas are written in, for plain numbers. SIMD packs overload the same names (cpu/pack.h).
#pragma once
#include "math/target.h"

namespace fusedopt::FUSEDOPT_TARGET {

// One rounding where the machine has the instruction. Without it (x86-64 before 2013) the product is rounded first:
// a correct fma in software would cost more than the whole formula.
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDA_ARCH__) || defined(CUDA_HOST_SHIM)
HOST_DEVICE inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
HOST_DEVICE inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
HOST_DEVICE inline float fma(float a, float b, float c) { return a * b + c; }
HOST_DEVICE inline double fma(double a, double b, double c) { return a * b + c; }
#endif

// a * b - c.
HOST_DEVICE inline float fms(float a, float b, float c) { return fma(a, b, -c); }
HOST_DEVICE inline double fms(double a, double b, double c) { return fma(a, b, -c); }

HOST_DEVICE inline float sqrt(float a) { return __builtin_sqrtf(a); }
HOST_DEVICE inline double sqrt(double a) { return __builtin_sqrt(a); }

// The larger one, or NaN if either is NaN (as torch.maximum and numpy.maximum).
HOST_DEVICE inline float maximum(float a, float b) { return a > b || a != a ? a : b; }
HOST_DEVICE inline double maximum(double a, double b) { return a > b || a != a ? a : b; }

// a where x >= 0, else (x is NaN among it) b.
HOST_DEVICE inline float where_not_negative(float x, float a, float b) { return x >= 0 ? a : b; }
HOST_DEVICE inline double where_not_negative(double x, double a, double b) { return x >= 0 ? a : b; }

}  // namespace fusedopt::FUSEDOPT_TARGET
