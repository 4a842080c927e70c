// A look at the cost before anything is computed: range, NaN, -inf, rows and columns that no mass can enter.
#pragma once
#include "cpu/sinkhorn_newton_sparse/pass.h"

namespace fusedopt::FUSEDOPT_TARGET {

// The first NaN and the first -inf of a row that has one.
template <typename T>
inline void find_bad(const TransportProblem& p, int64_t i, const T* row, CostSummary* summary) {
  for (int64_t j = 0; j < p.m; ++j) {
    const double c = row[j];
    if (c != c && summary->nans < 0) summary->nans = i * p.m + j;
    if (c == -__builtin_inf() && summary->minus_infs < 0) summary->minus_infs = i * p.m + j;
  }
}

// What one row's elements say, taken in as packs or one by one.
template <typename V>
struct RowSummary {
  V least = V(__builtin_inf()), most = V(-__builtin_inf()), open = V(0.0), nan = V(0.0);

  // b: the columns' marginals; reached: the largest marginal of a row that can send mass there.
  FUSEDOPT_INLINE V add(V c, V b, V a, V reached) {
    const V inf(__builtin_inf()), zero(0.0);
    least = smaller(c, least);
    most = larger(select_less(c, inf, c, V(-__builtin_inf())), most);
    open = larger(select_less(c, inf, b, zero), open);
    nan = nan + where_nan(c, zero);
    return larger(select_less(c, inf, a, zero), reached);
  }
};

// Rows [begin, end); what they say of columns is in `reached` alone.
template <typename T>
inline CostSummary inspect_rows(const TransportProblem& p, int64_t begin, int64_t end, double* reached) {
  CostSummary summary = {__builtin_inf(), -__builtin_inf(), -1, -1, -1, -1};
  for (int64_t i = begin; i < end; ++i) {
    const T* const row = static_cast<const T*>(p.cost) + i * p.row_stride;
    const double a = p.a[i];
    RowSummary<D> packs;
    RowSummary<double> rest;
    int64_t j = 0;
    for (; j + kLanes <= p.m; j += kLanes)
      store(reached + j, packs.add(load(row + j), load(p.b + j), D(a), load(reached + j)));
    for (; j < p.m; ++j) reached[j] = rest.add(double(row[j]), p.b[j], a, reached[j]);
    const double least = smaller(-max_lanes(D(0.0) - packs.least), rest.least);
    const double nan = sum_lanes(packs.nan) + rest.nan;
    if (nan != nan || least == -__builtin_inf()) find_bad(p, i, row, &summary);
    if (a > 0 && !(larger(max_lanes(packs.open), rest.open) > 0) && summary.empty_row < 0) summary.empty_row = i;
    summary.least = smaller(least, summary.least);
    summary.most = larger(larger(max_lanes(packs.most), rest.most), summary.most);
  }
  return summary;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
