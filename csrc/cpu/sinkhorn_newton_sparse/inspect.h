// A look at the cost before anything is computed: range, NaN, -inf, rows and columns that no mass can enter.
#pragma once
#include "cpu/sinkhorn_newton_sparse/pass.h"

namespace fusedopt::FUSEDOPT_TARGET {

// `reached` has m bytes.
template <typename T>
inline CostSummary inspect_cost(const TransportProblem& p, unsigned char* reached) {
  CostSummary summary = {__builtin_inf(), -__builtin_inf(), -1, -1, -1, -1};
  for (int64_t j = 0; j < p.m; ++j) reached[j] = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    const T* const row = static_cast<const T*>(p.cost) + i * p.row_stride;
    double least = __builtin_inf(), most = -__builtin_inf();
    bool nan = false, open = false;
    for (int64_t j = 0; j < p.m; ++j) {
      const double c = row[j];
      nan |= c != c;
      const bool finite = c < __builtin_inf();
      least = c < least ? c : least;
      most = finite && c > most ? c : most;
      open |= finite & (p.b[j] > 0);
      reached[j] |= finite & (p.a[i] > 0);
    }
    if ((nan || least == -__builtin_inf()) && summary.nans < 0 && summary.minus_infs < 0)
      for (int64_t j = 0; j < p.m; ++j) {
        const double c = row[j];
        if (c != c && summary.nans < 0) summary.nans = i * p.m + j;
        if (c == -__builtin_inf() && summary.minus_infs < 0) summary.minus_infs = i * p.m + j;
      }
    if (p.a[i] > 0 && !open && summary.empty_row < 0) summary.empty_row = i;
    summary.least = least < summary.least ? least : summary.least;
    summary.most = most > summary.most ? most : summary.most;
  }
  for (int64_t j = p.m - 1; j >= 0; --j)
    if (p.b[j] > 0 && !reached[j]) summary.empty_column = j;
  return summary;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
