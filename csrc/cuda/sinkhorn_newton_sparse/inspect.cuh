// A look at the cost before anything is computed: range, NaN, -inf, rows and columns that no mass can enter. All of it
// is maxima, of places counted from the end: the largest is the first one.
#pragma once
#include "cuda/sinkhorn_newton_sparse/pass.cuh"

namespace fusedopt::cuda {

class Inspection {
 public:
  // Every thread gets the answers; the problem's facts get them too.
  __device__ FUSEDOPT_INLINE Inspection(Team& team, RowGroup& group, const TransportTask& task)
      : team_(team), group_(group), t_(task) {
    group_.each_chunk(t_.shape.chunks, [&](int64_t chunk) { look(chunk); });
    team_.sync();
    double found[kAnswers];
    team_.reduce<Larger>(t_.memory.partials, t_.m, found, [&](int64_t j, double(&v)[kAnswers]) {
      if (t_.b[j] > 0 && !reached(j)) v[kColumn] = -double(j);
    });
    const int64_t chunks = t_.shape.chunks;
#pragma unroll 1
    for (int64_t c = team_.thread(); c < chunks; c += blockDim.x)
#pragma unroll
      for (int k = 0; k < kColumn; ++k) found[k] = Larger::of(t_.memory.chunk_sums[k * chunks + c], found[k]);
    team_.finish<Larger>(found);
    most_ = found[kMostCost];
    least_ = -found[kMinusLeast];
    ok_ = true;
#pragma unroll
    for (int k = kNanAt; k < kAnswers; ++k) ok_ &= found[k] == Larger::kNothing;
    if (!team_.leads()) return;
    t_.facts[kLeast] = least_;
    t_.facts[kMost] = most_;
#pragma unroll
    for (int k = kNanAt; k < kAnswers; ++k) t_.facts[kNan + k - kNanAt] = found[k] == Larger::kNothing ? -1 : -found[k];
  }

  __device__ FUSEDOPT_INLINE double range() const { return most_ - least_; }
  // Whether it can be solved.
  __device__ FUSEDOPT_INLINE bool ok(double reg) const {
    const double least = least_ < 0 ? -least_ : least_, most = most_ < 0 ? -most_ : most_;
    return ok_ && reg >= kSmallestReg * Larger::of(least, most);
  }

 private:
  static constexpr double kSmallestReg = 1e-7;
  enum { kMinusLeast, kMostCost, kNanAt, kMinusInfAt, kRow, kColumn, kAnswers };
  static_assert(kColumn <= TransportMemory::kChunkSums && kAnswers <= kMostValues);
  static_assert(kEmptyColumn - kNan == kColumn - kNanAt);

  __device__ FUSEDOPT_INLINE void look(int64_t chunk) {
    int32_t* const reached = t_.memory.counts + chunk * t_.m;
#pragma unroll 1
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) reached[j] = 0;
    double v[kColumn];
    Team::clear<Larger>(v);
    const int64_t first = chunk * t_.shape.chunk_rows, last = first + t_.shape.chunk_rows;
#pragma unroll 1
    for (int64_t i = first; i < last && i < t_.n; ++i) {
      double open[1] = {0};
#pragma unroll 1
      for (int j = group_.rank(); j < t_.columns(); j += group_.size()) {
        const double c = t_.cost_at(i, j), place = -double(i * t_.m + j);
        if (c != c) v[kNanAt] = Larger::of(place, v[kNanAt]);
        if (c == -__builtin_inf()) v[kMinusInfAt] = Larger::of(place, v[kMinusInfAt]);
        v[kMinusLeast] = Larger::of(-c, v[kMinusLeast]);
        if (!(c < __builtin_inf())) continue;
        v[kMostCost] = Larger::of(c, v[kMostCost]);
        if (t_.b[j] > 0) open[0] = 1;
        if (t_.a[i] > 0) reached[j] = 1;
      }
      group_.reduce<Larger>(open);
      if (t_.a[i] > 0 && open[0] == 0) v[kRow] = Larger::of(-double(i), v[kRow]);
    }
    group_.reduce<Larger>(v);
    if (group_.rank() > 0) return;
#pragma unroll
    for (int k = 0; k < kColumn; ++k) t_.memory.chunk_sums[k * t_.shape.chunks + chunk] = v[k];
  }

  __device__ FUSEDOPT_INLINE bool reached(int64_t j) const {
    bool any = false;
#pragma unroll 1
    for (int64_t c = 0; c < t_.shape.chunks; ++c) any |= t_.memory.counts[c * t_.m + j] != 0;
    return any;
  }

  Team& team_;
  RowGroup& group_;
  const TransportTask& t_;
  double most_, least_;
  bool ok_;
};

}  // namespace fusedopt::cuda
