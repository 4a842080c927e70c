// A batch of contiguous matrices for Sinkhorn-Knopp; all pointers are the caller's.
#pragma once
#include <cstdint>

namespace fusedopt {

constexpr int64_t kMostKnoppRows = 8, kMostKnoppIterations = 100;

struct KnoppTask {
  const void* logits;
  const void* up;  // dF/dP; backward only
  void* result;    // P, or dF/dL
  bool single;     // float, else double
  int64_t n, m;    // at most kMostKnoppRows
  int64_t iterations;
};

}  // namespace fusedopt
