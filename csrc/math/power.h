// base^n for a whole n >= 0 by squaring, carried in two doubles so that the many roundings stay below the last bit.
// Bias corrections need it on the host and in capturable kernels on the device, with the same bits and without libm.
#pragma once
#include <cstdint>

#include "math/target.h"

namespace fusedopt::FUSEDOPT_TARGET {

struct DoubleDouble {  // high + low, |low| <= ulp(high) / 2
  double high, low;
};

// Dekker's exact product of two halves (Veltkamp's splitting): no fma, so every machine gives the same bits.
HOST_DEVICE inline DoubleDouble exact_product(double a, double b) {
  const double kSplit = 134217729.0;  // 2^27 + 1
  const double as = kSplit * a, bs = kSplit * b;
  const double ah = as - (as - a), bh = bs - (bs - b), al = a - ah, bl = b - bh;
  const double product = a * b;
  return {product, ((ah * bh - product) + ah * bl + al * bh) + al * bl};
}

HOST_DEVICE inline DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble p = exact_product(a.high, b.high);
  const double low = p.low + (a.high * b.low + a.low * b.high);
  const double high = p.high + low;
  return {high, low - (high - p.high)};
}

// 0 <= base < 1.
HOST_DEVICE inline DoubleDouble power(double base, int64_t n) {
  DoubleDouble result = {1.0, 0.0}, square = {base, 0.0};
  for (; n > 0; n >>= 1) {
    if (n & 1) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

// 1 - beta^step, Adam's bias correction.
HOST_DEVICE inline double bias_correction(double beta, int64_t step) {
  const DoubleDouble p = power(beta, step);
  return (1.0 - p.high) - p.low;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
