// The Newton system (diag(c) + shift - S' diag(1/a) S) v = b - c over the kept entries, by conjugate gradients scaled
// by the diagonal. The entries lie by rows and, copied once a step, by columns, so that a product gathers twice and
// scatters nowhere: per entry and iteration 24 bytes and two gathered numbers, from L2. Three barriers an iteration.
//
// Plans that nearly fall into pieces need many iterations, so the cap is high; the CPU's tree-like factor is
// sequential.
#pragma once
#include "cuda/sinkhorn_newton_sparse/pass.cuh"

namespace fusedopt::cuda {

class NewtonSystem {
 public:
  __device__ FUSEDOPT_INLINE NewtonSystem(Team& team, RowGroup& group, const TransportTask& task)
      : team_(team), group_(group), t_(task), w_(task.memory) {}

  // After a pass that kept entries. The diagonal is c_j + shift.
  __device__ FUSEDOPT_INLINE void prepare(double shift) {
    team_.each(t_.m, [&](int64_t j) { w_.column_begin[j] = places_in_column(j); });
    team_.sync();
    if (team_.block() == 0) begin_columns();
    team_.sync();
    group_.each_chunk(t_.shape.chunks, [&](int64_t chunk) { copy_by_columns(chunk); });
    team_.sync();
    each_list(
        t_.m,
        [&](int64_t j, double* sum) {
#pragma unroll 1
          for (int64_t e = w_.column_begin[j] + list_lane(); e < w_.column_begin[j + 1]; e += kLanesPerList)
            *sum = fma(w_.column_value[e] * w_.column_value[e], w_.inverse_a[w_.row[e]], *sum);
        },
        [&](int64_t, int64_t j, double sum, bool leads) {
          if (!leads) return;
          const double diagonal = w_.columns[j] + shift, least = 1e-13 * diagonal, left = diagonal - sum;
          w_.diagonal[j] = diagonal;  // cancellation may leave nothing of it
          w_.jacobi[j] = diagonal > 0 ? 1 / (left > least ? left : least) : 0;
        });
    team_.sync();
  }

  // Solves into step, from zero, until the residual's norm is this share of what it was; returns the iterations.
  __device__ FUSEDOPT_INLINE int64_t solve(double relative, int64_t most) {
    team_.each(t_.m, [&](int64_t j) {
      w_.step[j] = w_.direction[j] = w_.image[j] = 0;
      w_.residual[j] = t_.b[j] > 0 ? t_.b[j] - w_.columns[j] : 0;
    });
    double forward = 0, ratio = 0, along = 0, target = 0;
#pragma unroll 1
    for (int64_t k = 0;; ++k) {
      double now[2];  // <r,r>, <r,z>
      team_.reduce<Add>(w_.partials, t_.m, now, [&](int64_t j, double(&to)[2]) {
        w_.step[j] = fma(forward, w_.direction[j], w_.step[j]);
        const double r = fma(-forward, w_.image[j], w_.residual[j]), z = r * w_.jacobi[j];
        w_.residual[j] = r;
        w_.preconditioned[j] = z;
        to[0] = r * r;
        to[1] = r * z;
      });
      if (k == 0) target = relative * relative * now[0];
      if (!(now[0] > target) || k == most) return k;
      ratio = k == 0 ? 0 : now[1] / along;
      along = now[1];
      const double curvature = product(ratio);
      if (!(curvature > 0) || !(along > 0)) return k;  // as far as rounding lets it go
      forward = along / curvature;
    }
  }

 private:
  __device__ FUSEDOPT_INLINE int list_lane() const { return team_.lane() % kLanesPerList; }

  // Where each chunk's entries of a column begin among them; returns their number.
  __device__ FUSEDOPT_INLINE int64_t places_in_column(int64_t j) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int64_t c = 0; c < t_.shape.chunks; ++c) {
      int32_t& count = w_.counts[c * t_.m + j];
      const int32_t own = count;
      count = sum;
      sum += own;
    }
    return sum;
  }

  // Column begins from their numbers of entries: each thread a run of columns.
  __device__ FUSEDOPT_INLINE void begin_columns() {
    const int64_t run = ceil_div(t_.m, blockDim.x), first = team_.thread() * run;
    const int64_t last = first + run < t_.m ? first + run : t_.m;
    double v[2] = {};  // whole numbers; of the threads of this warp that come before, and of all
#pragma unroll 1
    for (int64_t j = first; j < last; ++j) v[1] += double(w_.column_begin[j]);
    double before = 0, all = 0;
#pragma unroll 1
    for (int other = 0; other < kWarp; ++other) {
      const double theirs = __shfl_sync(~0u, v[1], other);
      if (other < team_.lane()) before += theirs;
      all += theirs;
    }
    v[1] = all;
    team_.before_warp(v);
    int64_t at = int64_t(v[0] + before);
#pragma unroll 1
    for (int64_t j = first; j < last; ++j) {
      const int64_t count = w_.column_begin[j];
      w_.column_begin[j] = at;
      at += count;
    }
    if (team_.thread() == 0) w_.column_begin[t_.m] = int64_t(v[1]);
  }

  // Rows one after the other: the entries of one row are of different columns.
  __device__ FUSEDOPT_INLINE void copy_by_columns(int64_t chunk) {
    const int64_t first = chunk * t_.shape.chunk_rows, last = first + t_.shape.chunk_rows;
#pragma unroll 1
    for (int64_t i = first; i < last && i < t_.n; ++i) {
      const int64_t begin = w_.row_begin[i];
      const int32_t count = w_.row_count[i];
#pragma unroll 1
      for (int32_t e = group_.rank(); e < count; e += group_.size()) {
        const int32_t j = w_.column[begin + e];
        const int64_t at = w_.column_begin[j] + w_.counts[chunk * t_.m + j]++;
        w_.column_value[at] = w_.value[begin + e];
        w_.row[at] = int32_t(i);
      }
      group_.sync();
    }
  }

  // For lists of entries, kLanesPerList lanes to each: calls add(list, &sum) in the lanes of each list, then
  // take(tile, list, sum, leads) in all lanes of the warp; leads: it is the first of its list.
  template <typename AddTo, typename Take>
  __device__ FUSEDOPT_INLINE void each_list(int64_t count, AddTo add, Take take) const {
#pragma unroll 1
    for (int64_t tile = team_.first_tile(); tile * kLists < count; tile += int64_t(team_.blocks()) * team_.warps()) {
      const int64_t list = tile * kLists + team_.lane() / kLanesPerList;
      double sum = 0;
      if (list < count) add(list, &sum);
#pragma unroll
      for (int step = kLanesPerList / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      take(tile, list, sum, list_lane() == 0 && list < count);
    }
  }
  static constexpr int kLists = kWarp / kLanesPerList;

  // direction = preconditioned + ratio direction; image = system direction. Returns <direction, image>.
  __device__ FUSEDOPT_INLINE double product(double ratio) {
    each_list(
        t_.n,
        [&](int64_t i, double* sum) {
          const int64_t begin = w_.row_begin[i];
#pragma unroll 1
          for (int32_t e = list_lane(); e < w_.row_count[i]; e += kLanesPerList) {
            const int32_t j = w_.column[begin + e];
            *sum = fma(w_.value[begin + e], fma(ratio, w_.direction[j], w_.preconditioned[j]), *sum);
          }
        },
        [&](int64_t, int64_t i, double sum, bool leads) {
          if (leads) w_.row_value[i] = -sum * w_.inverse_a[i];
        });
    team_.sync();
    double* const out = team_.next(w_.partials);
    const int64_t tiles = (t_.m + kLists - 1) / kLists;
    double v[1];
    each_list(
        t_.m,
        [&](int64_t j, double* sum) {
#pragma unroll 1
          for (int64_t e = w_.column_begin[j] + list_lane(); e < w_.column_begin[j + 1]; e += kLanesPerList)
            *sum = fma(w_.column_value[e], w_.row_value[w_.row[e]], *sum);
        },
        [&](int64_t tile, int64_t j, double sum, bool leads) {
          v[0] = 0;
          if (leads) {
            const double direction = fma(ratio, w_.direction[j], w_.preconditioned[j]);
            const double image = fma(w_.diagonal[j], direction, sum);
            w_.direction[j] = direction;
            w_.image[j] = image;
            v[0] = direction * image;
          }
          team_.store_tile<Add>(out, tile, tiles, v);
        });
    team_.sync();
    v[0] = 0;
    team_.add_tiles<Add>(out, tiles, v);
    team_.finish<Add>(v);
    return v[0];
  }

  Team& team_;
  RowGroup& group_;
  const TransportTask& t_;
  const TransportMemory& w_;
};

}  // namespace fusedopt::cuda
