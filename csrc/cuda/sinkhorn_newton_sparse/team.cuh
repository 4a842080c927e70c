// The threads that solve one problem: one thread block, or all of the grid. The same code runs on either; a team of one
// block meets in __syncthreads, a larger one at the grid's barrier. Every sum goes the same way in both: warps add up
// tiles of 32 numbers, each thread block then adds up all tiles by itself.
//
// What is not in a thread's registers lies in the problem's workspace, so that blocks see each other's work.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/sinkhorn_newton_sparse/memory.h"

namespace fusedopt::cuda {

struct Add {
  __device__ FUSEDOPT_INLINE static double of(double x, double y) { return x + y; }
  static constexpr double kNothing = 0;
};
struct Larger {
  __device__ FUSEDOPT_INLINE static double of(double x, double y) { return x > y ? x : y; }
  static constexpr double kNothing = -1.7976931348623157e308;
};

constexpr int kMostValues = 7;  // reduced at once

struct TeamScratch {  // in shared memory
  double values[2][kMostValues][kMostWarps];
  double columns[kMostWarps][kWarp];
};

template <typename Op, int K>
__device__ FUSEDOPT_INLINE void reduce_warp(double (&v)[K]) {
#pragma unroll 1  // reductions would be most of the machine code
  for (int step = kWarp / 2; step > 0; step /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = Op::of(v[k], __shfl_xor_sync(~0u, v[k], step));
}

class Team {
 public:
  __device__ Team(bool one_block, TeamScratch& scratch, uint32_t* barrier)
      : one_block_(one_block), scratch_(scratch), barrier_(barrier) {}

  // This thread block, and how many the team has; this thread in its block. Asked for again where they are needed:
  // registers are what this kernel is short of.
  __device__ FUSEDOPT_INLINE int block() const { return one_block_ ? 0 : blockIdx.x; }
  __device__ FUSEDOPT_INLINE int blocks() const { return one_block_ ? 1 : gridDim.x; }
  __device__ FUSEDOPT_INLINE static int thread() { return threadIdx.x; }
  __device__ FUSEDOPT_INLINE static int lane() { return threadIdx.x % kWarp; }
  __device__ FUSEDOPT_INLINE static int warp() { return threadIdx.x / kWarp; }
  __device__ FUSEDOPT_INLINE static int warps() { return blockDim.x / kWarp; }

  __device__ FUSEDOPT_INLINE bool leads() const { return block() == 0 && thread() == 0; }
  __device__ FUSEDOPT_INLINE TeamScratch& scratch() { return scratch_; }

  // Writes before it are seen by the whole team after it.
  __device__ FUSEDOPT_INLINE void sync() const {
    if (blocks() == 1)
      __syncthreads();
    else
      grid_barrier(barrier_);
  }

  // From every warp's values to those of the thread block, in every thread.
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE void across_warps(double (&v)[K]) {
    static_assert(K <= kMostValues);
    double(*const to)[kMostWarps] = scratch_.values[turn_];
    turn_ ^= 1;  // those who still read this turn's are not in the way of the next
    if (lane() == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) to[k][warp()] = v[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = to[k][0];
#pragma unroll 1
    for (int w = 1; w < warps(); ++w)
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = Op::of(v[k], to[k][w]);
  }

  // Calls f(i) for each i below count, one thread to each; always the same one.
  template <typename F>
  __device__ FUSEDOPT_INLINE void each(int64_t count, F f) const {
#pragma unroll 1
    for (int64_t i = first(); i < count; i += int64_t(blocks()) * blockDim.x) f(i);
  }

  // v[k] = the sum (or maximum) over i of what f(i, v) adds to it, in every thread. Syncs the team.
  template <typename Op, int K, typename F>
  __device__ FUSEDOPT_INLINE void reduce(double* const (&partials)[2], int64_t count, double (&v)[K], F f) {
    const int64_t tiles = (count + kWarp - 1) >> 5;
    double* const out = next(partials);
#pragma unroll 1
    for (int64_t tile = first_tile(); tile < tiles; tile += int64_t(blocks()) * warps()) {
      const int64_t i = tile * kWarp + lane();
      clear<Op>(v);
      if (i < count) f(i, v);
      store_tile<Op>(out, tile, tiles, v);
    }
    sync();
    clear<Op>(v);
    add_tiles<Op>(out, tiles, v);
    finish<Op>(v);
  }

  // Its parts, for sums over something else than numbers in a row.
  __device__ FUSEDOPT_INLINE double* next(double* const (&partials)[2]) {
    phase_ ^= 1;
    return phase_ ? partials[1] : partials[0];
  }
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE void store_tile(double* out, int64_t tile, int64_t tiles, double (&v)[K]) const {
    reduce_warp<Op>(v);
    if (lane() == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) out[k * tiles + tile] = v[k];
  }
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE void add_tiles(const double* out, int64_t tiles, double (&v)[K], int used = K) const {
#pragma unroll 1
    for (int64_t tile = thread(); tile < tiles; tile += blockDim.x)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < used) v[k] = Op::of(v[k], out[k * tiles + tile]);
  }
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE void finish(double (&v)[K]) {
    reduce_warp<Op>(v);
    across_warps<Op>(v);
  }
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE static void clear(double (&v)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = Op::kNothing;
  }

  // v[1] is every warp's number; v[0] becomes the sum of those of the warps before, v[1] that of all.
  __device__ FUSEDOPT_INLINE void before_warp(double (&v)[2]) {
    double* const to = scratch_.values[turn_][0];
    turn_ ^= 1;
    if (lane() == 0) to[warp()] = v[1];
    __syncthreads();
    v[0] = v[1] = 0;
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) {
      if (w < warp()) v[0] += to[w];
      v[1] += to[w];
    }
  }

  __device__ FUSEDOPT_INLINE int64_t first() const { return int64_t(block()) * blockDim.x + thread(); }
  __device__ FUSEDOPT_INLINE int64_t first_tile() const { return int64_t(block()) * warps() + warp(); }

 private:
  const bool one_block_;
  TeamScratch& scratch_;
  uint32_t* const barrier_;
  int turn_ = 0, phase_ = 0;
};

// Those of a team who share a row: a warp, or a thread block where rows are long. A member takes every so many columns
// of all rows, so that row and column sums in the group's memory are its own and need no barrier.
class RowGroup {
 public:
  __device__ FUSEDOPT_INLINE RowGroup(Team& team, bool wide) : wide_(wide), team_(team) {}
  __device__ FUSEDOPT_INLINE bool wide() const { return wide_; }
  __device__ FUSEDOPT_INLINE int rank() const { return wide_ ? team_.thread() : team_.lane(); }
  __device__ FUSEDOPT_INLINE int size() const { return wide_ ? blockDim.x : kWarp; }

  // Calls f(chunk) for the chunks of this group.
  template <typename F>
  __device__ FUSEDOPT_INLINE void each_chunk(int64_t chunks, F f) const {
    const int64_t groups = int64_t(team_.blocks()) * (wide_ ? 1 : team_.warps());
#pragma unroll 1
    for (int64_t c = wide_ ? team_.block() : team_.block() * team_.warps() + team_.warp(); c < chunks; c += groups)
      f(c);
  }
  template <typename Op, int K>
  __device__ FUSEDOPT_INLINE void reduce(double (&v)[K]) {
    reduce_warp<Op>(v);
    if (wide_) team_.across_warps<Op>(v);
  }
  // The sum of the members before this one, and of all.
  __device__ FUSEDOPT_INLINE int scan(int mine, int* total) {
    int sum = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int before = __shfl_up_sync(~0u, sum, step);
      if (team_.lane() >= step) sum += before;
    }
    *total = __shfl_sync(~0u, sum, kWarp - 1);
    if (!wide_) return sum - mine;
    double before[2] = {0, double(*total)};  // whole numbers
    team_.before_warp(before);
    *total = int(before[1]);
    return int(before[0]) + sum - mine;
  }
  __device__ FUSEDOPT_INLINE void sync() const {
    if (wide_)
      __syncthreads();
    else
      __syncwarp();
  }

 private:
  const bool wide_;
  Team& team_;
};

}  // namespace fusedopt::cuda
