// The fused pass: one read of the cost and at most one exp per element give f, the column sums, and the plan's larger
// entries (math/sinkhorn_newton_sparse.h has the formulas). A row is held in shared memory between its sum and its
// share in the columns; consecutive threads read consecutive elements.
//
// Chunks of rows, as many on any GPU, have column sums of their own, which are then added in order: 2 * 8 bytes per
// chunk and column beside the cost, 5 % of it at n = 10000. Arithmetic is in double for float costs too: some 30
// operations per element, as long as 8 bytes take on a GPU with full-rate double.
#pragma once
#include "cuda/sinkhorn_newton_sparse/task.cuh"
#include "cuda/sinkhorn_newton_sparse/team.cuh"
#include "math/sinkhorn_newton_sparse.h"

namespace fusedopt::cuda {

struct PassOptions {
  double reg;
  double keep;   // keep entries from this share of their row's or column's mass on; 0: keep none
  double relax;  // f moves by this much of the way to its exact value; 1: all of it
};

struct PlanSums {
  double error, cost, mass;
};

class Pass {
 public:
  __device__ FUSEDOPT_INLINE Pass(Team& team, RowGroup& group, const TransportTask& task, double* shared_rows)
      : team_(team), group_(group), t_(task), shared_rows_(shared_rows) {}

  // f, columns and kept entries at g.
  __device__ FUSEDOPT_INLINE PassSums run(const PassOptions& options) {
    team_.sync();
    group_.each_chunk(t_.shape.chunks, [&](int64_t chunk) { solve_rows(options, chunk); });
    team_.sync();
    return add_up();
  }

  // Sums of the plan that f and g give, as a user would compute it.
  __device__ FUSEDOPT_INLINE PlanSums measure(double reg) {
    team_.sync();
    group_.each_chunk(t_.shape.chunks, [&](int64_t chunk) { plan_rows(reg, chunk); });
    team_.sync();
    double* const out = team_.next(t_.memory.partials);
    add_chunks([&](int64_t tile, int64_t tiles, int64_t j, double sum) {
      double v[1] = {j < t_.m ? distance(sum, t_.b[j]) : 0};
      team_.store_tile<Add>(out, tile, tiles, v);
    });
    team_.sync();
    double v[3] = {};
    team_.add_tiles<Add>(out, t_.shape.tiles, v, 1);
    add_chunk_sums(v[0], v[1], v[2]);
    team_.finish<Add>(v);
    return {v[0], v[1], v[2]};
  }

  // The largest of f_i - C_ij in a column.
  __device__ FUSEDOPT_INLINE double column_top(int64_t j) const {
    double most = Larger::kNothing;
#pragma unroll 1
    for (int64_t i = 0; i < t_.n; ++i)
      if (t_.a[i] > 0) most = Larger::of(t_.f[i] - t_.cost_at(i, j), most);
    return most;
  }

 private:
  __device__ FUSEDOPT_INLINE static double distance(double x, double y) { return x < y ? y - x : x - y; }
  __device__ FUSEDOPT_INLINE int64_t last_row(int64_t chunk) const {
    const int64_t last = (chunk + 1) * t_.shape.chunk_rows;
    return last < t_.n ? last : t_.n;
  }
  __device__ FUSEDOPT_INLINE int64_t first_row(int64_t chunk) const { return chunk * t_.shape.chunk_rows; }

  // This group's memory for a row, and for the column sums of a chunk.
  __device__ FUSEDOPT_INLINE double* row_of(int64_t chunk) const {
    if (!shared_rows_) return t_.memory.slack + chunk * t_.m;
    return shared_rows_ + (group_.wide() ? 0 : team_.warp()) * 2 * t_.m;
  }
  __device__ FUSEDOPT_INLINE double* columns_of(int64_t chunk) const {
    return shared_rows_ ? row_of(chunk) + t_.m : t_.memory.partial + chunk * t_.m;
  }
  __device__ FUSEDOPT_INLINE void publish(int64_t chunk, const double* columns) const {
    double* const to = t_.memory.partial + chunk * t_.m;
    if (to != columns)
#pragma unroll 1
      for (int j = group_.rank(); j < t_.columns(); j += group_.size()) to[j] = columns[j];
  }
  __device__ FUSEDOPT_INLINE void publish(int64_t chunk, double sum0, double sum1, double sum2) const {
    double* const to = t_.memory.chunk_sums + chunk;
    if (group_.rank() > 0) return;
    to[0] = sum0;
    to[t_.shape.chunks] = sum1;
    to[2 * t_.shape.chunks] = sum2;
  }
  __device__ FUSEDOPT_INLINE void add_chunk_sums(double& sum0, double& sum1, double& sum2) const {
    const int64_t chunks = t_.shape.chunks;
#pragma unroll 1
    for (int64_t c = team_.thread(); c < chunks; c += blockDim.x) {
      sum0 += t_.memory.chunk_sums[c];
      sum1 += t_.memory.chunk_sums[chunks + c];
      sum2 += t_.memory.chunk_sums[2 * chunks + c];
    }
  }

  __device__ FUSEDOPT_INLINE void solve_rows(const PassOptions& options, int64_t chunk) {
    double *const row = row_of(chunk), *const columns = columns_of(chunk);
#pragma unroll 1
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) {
      columns[j] = 0;
      if (options.keep > 0) t_.memory.counts[chunk * t_.m + j] = 0;
    }
    const double inverse_reg = 1 / options.reg;
    const int64_t room = t_.shape.chunk_room;
    int64_t kept = 0;  // more than there is room for: nothing more is kept
    double objective = 0;
#pragma unroll 1
    for (int64_t i = first_row(chunk); i < last_row(chunk); ++i) {
      const double mass = t_.a[i];
      if (!(mass > 0)) {
        if (group_.rank() == 0) t_.f[i] = -__builtin_inf(), t_.memory.row_count[i] = 0;
        continue;
      }
      const double before = options.relax == 1 ? 0 : t_.f[i];
      double largest[1] = {t_.single ? row_slack<float>(i, row) : row_slack<double>(i, row)};
      group_.reduce<Larger>(largest);
      double sum[1] = {row_entries(row, largest[0], inverse_reg)};
      group_.reduce<Add>(sum);
      double f = row_potential(options.reg, t_.memory.log_a[i], sum[0], largest[0]), scale = mass / sum[0];
      if (options.relax != 1) {
        double further = (options.relax - 1) * (f - before) * inverse_reg;
        further = further > kFurthest ? kFurthest : further < -kFurthest ? -kFurthest : further;
        f += further * options.reg;
        scale *= exp(further);
        group_.sync();  // everyone has read f
      }
      if (group_.rank() == 0) t_.f[i] = f;
      objective -= mass * f;
#pragma unroll 1
      for (int j = group_.rank(); j < t_.columns(); j += group_.size())
        if (row[j] > 0) columns[j] = fma(scale, row[j], columns[j]);
      if (options.keep > 0 && kept <= room) keep_row(i, chunk, row, scale, options.keep, &kept);
    }
    publish(chunk, columns);
    publish(chunk, objective, double(kept), kept > room ? 1.0 : 0.0);
  }
  static constexpr double kFurthest = 10;  // beyond it over-relaxation is no help

  // slack_j = g_j - C_ij of this member's columns; returns the largest.
  template <typename T>
  __device__ FUSEDOPT_INLINE double row_slack(int64_t i, double* row) const {
    const T* const cost = static_cast<const T*>(t_.cost) + i * t_.row_stride;
    double most = Larger::kNothing;
#pragma unroll 4
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) {
      const double slack = t_.g[j] - double(__ldcs(cost + j));
      row[j] = slack;
      most = Larger::of(slack, most);
    }
    return most;
  }

  // Turns slack into entries over the row's largest; returns their sum.
  __device__ FUSEDOPT_INLINE double row_entries(double* row, double largest, double inverse_reg) const {
    double sum = 0;
#pragma unroll 2
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) {
      const double x = relative_exponent(row[j], largest, inverse_reg);
      double entry = 0;
      if (x >= -kCut) entry = exp_within_range<double>(x);
      row[j] = entry;
      sum += entry;
    }
    return sum;
  }

  // Lists the row's larger entries behind those of the chunk's rows before.
  __device__ FUSEDOPT_INLINE void keep_row(int64_t i, int64_t chunk, const double* row, double scale, double keep,
                                           int64_t* kept) {
    const double row_least = keep * t_.a[i];
    const auto is_kept = [&](int64_t j) {
      const double entry = scale * row[j], least = keep * t_.b[j];
      return entry > 0 && entry >= (least < row_least ? least : row_least);
    };
    int mine = 0, total;
#pragma unroll 1
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) mine += is_kept(j);
    const int first = group_.scan(mine, &total);
    const int64_t begin = chunk * t_.shape.chunk_room + *kept;
    *kept += total;
    if (*kept > t_.shape.chunk_room) return;
    if (group_.rank() == 0) t_.memory.row_begin[i] = begin, t_.memory.row_count[i] = total;
    int64_t at = begin + first;
#pragma unroll 1
    for (int j = group_.rank(); j < t_.columns(); j += group_.size())
      if (is_kept(j)) {
        t_.memory.value[at] = scale * row[j];
        t_.memory.column[at++] = int32_t(j);
        ++t_.memory.counts[chunk * t_.m + j];
      }
  }

  __device__ FUSEDOPT_INLINE void plan_rows(double reg, int64_t chunk) {
    double* const columns = columns_of(chunk);
#pragma unroll 1
    for (int j = group_.rank(); j < t_.columns(); j += group_.size()) columns[j] = 0;
    const double inverse_reg = 1 / reg;
    double error = 0, cost = 0, mass = 0;
#pragma unroll 1
    for (int64_t i = first_row(chunk); i < last_row(chunk); ++i) {
      double v[2] = {};  // the row's mass and cost
#pragma unroll 1
      for (int j = group_.rank(); j < t_.columns(); j += group_.size()) {
        const double c = t_.cost_at(i, j), entry = exp(((t_.f[i] - c) + t_.g[j]) * inverse_reg);
        if (!(entry > 0)) continue;  // 0 * inf is 0 here
        columns[j] += entry;
        v[0] += entry;
        v[1] += entry * c;
      }
      group_.reduce<Add>(v);
      error += distance(v[0], t_.a[i]);
      mass += v[0];
      cost += v[1];
    }
    publish(chunk, columns);
    publish(chunk, error, cost, mass);
  }

  // Calls take(tile, tiles, j, sum) in each lane of one warp a tile of columns, also for j behind the last. All warps
  // of the thread block share a tile's chunks.
  template <typename F>
  __device__ FUSEDOPT_INLINE void add_chunks(F take) {
    const int64_t tiles = t_.shape.tiles, chunks = t_.shape.chunks;
    double(*const sums)[kWarp] = team_.scratch().columns;
#pragma unroll 1
    for (int64_t tile = team_.block(); tile < tiles; tile += team_.blocks()) {
      const int64_t j = tile * kWarp + team_.lane();
      double sum = 0;
      if (j < t_.m)
#pragma unroll 4
        for (int64_t c = team_.warp(); c < chunks; c += team_.warps()) sum += t_.memory.partial[c * t_.m + j];
      sums[team_.warp()][team_.lane()] = sum;
      __syncthreads();
      if (team_.warp() == 0) {
#pragma unroll 1
        for (int w = 1; w < team_.warps(); ++w) sum += sums[w][team_.lane()];
        take(tile, tiles, j, sum);
      }
      __syncthreads();
    }
  }

  __device__ FUSEDOPT_INLINE PassSums add_up() {
    double* const out = team_.next(t_.memory.partials);
    add_chunks([&](int64_t tile, int64_t tiles, int64_t j, double sum) {
      double v[4] = {};
      if (j < t_.m) {
        t_.memory.columns[j] = sum;
        const double gap = t_.b[j] - sum;
        v[0] = gap < 0 ? -gap : gap;
        v[1] = gap * gap;
        v[2] = -gap * t_.memory.step[j];
        v[3] = t_.b[j] > 0 ? -t_.b[j] * t_.g[j] : 0;
      }
      team_.store_tile<Add>(out, tile, tiles, v);
    });
    team_.sync();
    double v[6] = {};
    team_.add_tiles<Add>(out, t_.shape.tiles, v, 4);
    add_chunk_sums(v[3], v[4], v[5]);
    team_.finish<Add>(v);
    return {v[0], v[1], v[2], v[3], v[4], v[5] > 0};
  }

  Team& team_;
  RowGroup& group_;
  const TransportTask& t_;
  double* const shared_rows_;
};

}  // namespace fusedopt::cuda
