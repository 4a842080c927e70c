// Tiny plans: P = diag(u) K diag(v), K = exp(-C / reg), from u = 1 by v = b / (K' u), u = a / (K v), again and again.
//
// A float matrix of up to 4 x 4 is one thread's, in registers; any other that of eight threads, a row each. Rows and
// columns of K are scaled to a largest entry of 1, which changes no plan and lets costs differ by 80 reg in float and
// 600 reg in double. 8 bytes per element in float, 2 n m (iterations + 1) multiply-adds per problem: at 20 iterations
// of 4 x 4 the arithmetic takes about as long as the memory.
//
// Backward, with R_ij = K_ij u_i v_j / a_i of each row step and likewise of each column step, from the gradient G of P:
//   row step     dC += reg^-1 du_i R_ij,  dv_j -= sum_i du_i R_ij        (du, dv: of log u, log v)
//   column step  dC += reg^-1 dv_j C_ij,  du_i  = -sum_j dv_j C_ij
// All iterations are run first, which leaves every u in the workspace: 12 n bytes more per iteration and problem, in
// float.
#define FUSEDOPT_TARGET cuda
#include "cuda/launch.cuh"
#include "cuda/sinkhorn_newton_sparse_tiny.h"
#include "math/exp.h"

namespace fusedopt::cuda {
namespace {

constexpr int kTinyThreads = 128;

// What a thread holds of an n x m matrix padded to kSize x kSize: kRows whole rows of it. The kSize / kRows threads of
// a matrix are neighbours.
template <typename S, int kSize, int kRows>
struct TinyMatrix {
  static constexpr int kSharers = kSize / kRows;
  S x[kRows][kSize];

  __device__ static int64_t problem() { return (int64_t(blockIdx.x) * kTinyThreads + threadIdx.x) / kSharers; }
  __device__ static int row(int i) { return threadIdx.x % kSharers * kRows + i; }

  // `whole`: kSize x kSize, aligned to 16 bytes. What lies beyond n and m is `padding`.
  __device__ void load(const S* from, int n, int m, bool whole, S padding) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        uint4 pieces[kSize * sizeof(S) / 16];
#pragma unroll
        for (int k = 0; k < int(kSize * sizeof(S) / 16); ++k)
          pieces[k] = reinterpret_cast<const uint4*>(from + row(i) * kSize)[k];
        memcpy(x[i], pieces, sizeof pieces);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[i][j] = row(i) < n && j < m ? from[row(i) * m + j] : padding;
  }
  __device__ void store(S* to, int n, int m, bool whole) const {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        uint4 pieces[kSize * sizeof(S) / 16];
        memcpy(pieces, x[i], sizeof pieces);
#pragma unroll
        for (int k = 0; k < int(kSize * sizeof(S) / 16); ++k)
          reinterpret_cast<uint4*>(to + row(i) * kSize)[k] = pieces[k];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (row(i) < n && j < m) to[row(i) * m + j] = x[i][j];
  }

  // Over the threads of the matrix, whoever else of the warp has one.
  template <typename Op>
  __device__ static S over_sharers(S v, Op op) {
#pragma unroll
    for (int step = kSharers / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(~0u, v, step));
    return v;
  }
};

template <typename S>
struct TinyGradient {
  const S* of_plan;
  S *of_cost, *history;  // nullptr: the plan is wanted
};

template <typename S, int kSize, int kRows>
struct TinyProblem {
  using Matrix = TinyMatrix<S, kSize, kRows>;
  const TinyPlans& plans;
  int64_t problem, offset;
  bool exists, whole;
  Matrix kernel;
  S a[kRows], b[kSize], u[kRows], v[kSize];

  __device__ explicit TinyProblem(const TinyPlans& given, bool aligned) : plans(given), problem(Matrix::problem()) {
    exists = problem < plans.problems;
    if (!exists) problem = plans.problems - 1;  // so that all threads take part in what a warp does
    offset = problem * plans.n * plans.m;
    whole = aligned && plans.n == kSize && plans.m == kSize;
    kernel.load(static_cast<const S*>(plans.cost) + offset, plans.n, plans.m, whole, S(__builtin_inf()));
#pragma unroll
    for (int i = 0; i < kRows; ++i) a[i] = marginal(plans.a, Matrix::row(i), plans.n);
#pragma unroll
    for (int j = 0; j < kSize; ++j) b[j] = marginal(plans.b, j, plans.m);
    scale();
  }

  // K with a largest entry of 1 in each row and column, and the first u in these units.
  __device__ void scale() {
    const auto larger = [](S x, S y) { return x > y ? x : y; };
    const S lowest = -S(__builtin_inf()), inverse = S(1 / plans.reg);
    S most = lowest, least_cost[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      S top = lowest;
#pragma unroll
      for (int j = 0; j < kSize; ++j) top = larger(top, -kernel.x[i][j]);
      least_cost[i] = top == lowest ? 0 : top;
      most = larger(most, top);
    }
    most = Matrix::over_sharers(most, larger);
#pragma unroll
    for (int i = 0; i < kRows; ++i) u[i] = Matrix::row(i) < plans.n ? exp((least_cost[i] - most) * inverse) : 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      S top = lowest;
#pragma unroll
      for (int i = 0; i < kRows; ++i) top = larger(top, -kernel.x[i][j] - least_cost[i]);
      top = Matrix::over_sharers(top, larger);
      top = top == lowest ? 0 : top;
#pragma unroll
      for (int i = 0; i < kRows; ++i) kernel.x[i][j] = exp((-kernel.x[i][j] - least_cost[i] - top) * inverse);
    }
  }

  __device__ static S marginal(const void* given, int i, int size) {
    if (i >= size) return 0;
    return given ? static_cast<const S*>(given)[i] : S(1) / S(size);
  }
  // Beyond the matrix there is nothing, and no division by it.
  __device__ static S divide(S x, S by) { return by > 0 || by != by ? x / by : S(0); }

  __device__ int64_t place(int k, int i) const {
    return (int64_t(k) * kSize + Matrix::row(i)) * plans.problems + problem;
  }
  __device__ void remember(S* history, int k) const {
    if (!exists) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) history[place(k, i)] = u[i];
  }
  __device__ void recall(const S* history, int k) {
    if (!exists) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) u[i] = history[place(k, i)];
  }

  __device__ void move_columns() {
    const auto add = [](S x, S y) { return x + y; };
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      S sum = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum = fma(kernel.x[i][j], u[i], sum);
      v[j] = divide(b[j], Matrix::over_sharers(sum, add));
    }
  }
  __device__ void move_rows() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      S sum = 0;
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum = fma(kernel.x[i][j], v[j], sum);
      u[i] = divide(a[i], sum);
    }
  }
};

// The way back from the plan's gradient, against the order of the iterations.
template <typename S, int kSize, int kRows>
struct TinyWayBack {
  using Problem = TinyProblem<S, kSize, kRows>;
  using Matrix = typename Problem::Matrix;
  Problem& p;
  const TinyGradient<S>& gradients;
  Matrix gradient = {};              // of log K
  S du[kRows] = {}, dv[kSize] = {};  // of log u and log v

  __device__ static S add(S x, S y) { return x + y; }

  // After the last iteration.
  __device__ void start() {
    gradient.load(gradients.of_plan + p.offset, p.plans.n, p.plans.m, p.whole, 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        gradient.x[i][j] *= p.kernel.x[i][j] * p.u[i] * p.v[j];
        du[i] += gradient.x[i][j];
        dv[j] += gradient.x[i][j];
      }
#pragma unroll
    for (int j = 0; j < kSize; ++j) dv[j] = Matrix::over_sharers(dv[j], add);
  }

  // From behind iteration k, with its u and v, to before it.
  __device__ void undo(int k) {
    S part[kSize] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const S share = p.divide(du[i] * p.u[i], p.a[i]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const S moved = share * p.kernel.x[i][j] * p.v[j];
        gradient.x[i][j] -= moved;
        part[j] += moved;
      }
      du[i] = 0;
    }
    p.recall(gradients.history, k);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const S share = p.divide((dv[j] - Matrix::over_sharers(part[j], add)) * p.v[j], p.b[j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const S moved = share * p.kernel.x[i][j] * p.u[i];
        gradient.x[i][j] -= moved;
        du[i] -= moved;
      }
      dv[j] = 0;
    }
  }

  __device__ void finish() {
    const S factor = S(-1 / p.plans.reg);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) gradient.x[i][j] *= factor;
    if (p.exists) gradient.store(gradients.of_cost + p.offset, p.plans.n, p.plans.m, p.whole);
  }
};

// The plan, or the cost's gradient from the plan's: all iterations, and then one after the other again from the last.
template <typename S, int kSize, int kRows>
__global__ void __launch_bounds__(kTinyThreads, sizeof(S) == 8 ? 2 : 4)
    tiny_plans_kernel(const TinyPlans __grid_constant__ plans, bool aligned, TinyGradient<S> gradients) {
  TinyProblem<S, kSize, kRows> p(plans, aligned);
  TinyWayBack<S, kSize, kRows> way_back = {p, gradients};
  const bool wants_gradient = gradients.of_cost != nullptr;
  bool back = false;
#pragma unroll 1
  for (int k = 0; k >= 0; k += back ? -1 : 1) {
    if (back)
      p.recall(gradients.history, k);
    else if (wants_gradient)
      p.remember(gradients.history, k);
    p.move_columns();
    p.move_rows();
    if (!back && k == plans.iterations - 1) {
      if (!wants_gradient) break;
      back = true;
      way_back.start();
    }
    if (back) way_back.undo(k);
  }
  if (wants_gradient) return way_back.finish();
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) p.kernel.x[i][j] *= p.u[i] * p.v[j];
  if (p.exists) p.kernel.store(static_cast<S*>(plans.plan) + p.offset, plans.n, plans.m, p.whole);
}

// One thread's: in float only, for in double it would be a third of all machine code here.
bool is_small(const TinyPlans& plans) { return plans.single && plans.n <= 4 && plans.m <= 4; }

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <typename S>
Status launch_in(const TinyPlans& plans, bool whole, const TinyGradient<S>& gradients, cudaStream_t stream) {
  if (plans.n < 1 || plans.m < 1 || plans.n > kTinySize || plans.m > kTinySize || plans.iterations < 1)
    return {"tiny plans have up to 8 rows and columns, and at least one iteration"};
  if (plans.problems == 0) return {};
  const bool small = is_small(plans);
  const int64_t blocks = (plans.problems * (small ? 1 : kTinySize) + kTinyThreads - 1) / kTinyThreads;
  if (blocks > 0x7fffffff) return {"more problems than one launch takes"};
  auto* kernel = tiny_plans_kernel<S, kTinySize, 1>;
  if constexpr (sizeof(S) == sizeof(float))
    if (small) kernel = tiny_plans_kernel<S, 4, 4>;
  return status_of(launch(kernel, dim3(unsigned(blocks)), dim3(kTinyThreads), 0, stream, plans, whole, gradients));
}

}  // namespace

int64_t tiny_plans_workspace_bytes(const TinyPlans& plans) {
  return plans.problems * plans.iterations * (is_small(plans) ? 4 : 8) * (plans.single ? 4 : 8);
}

Status launch_tiny_plans(const TinyPlans& plans, cudaStream_t stream) {
  const bool whole = aligned(plans.cost) && aligned(plans.plan);
  return plans.single ? launch_in<float>(plans, whole, {}, stream) : launch_in<double>(plans, whole, {}, stream);
}

Status launch_tiny_plans_backward(const TinyPlans& plans, const void* plan_gradient, void* cost_gradient,
                                  void* workspace, cudaStream_t stream) {
  const bool whole = aligned(plans.cost) && aligned(plan_gradient) && aligned(cost_gradient);
  const auto run = [&](auto number) {
    using S = decltype(number);
    const TinyGradient<S> gradients = {static_cast<const S*>(plan_gradient), static_cast<S*>(cost_gradient),
                                       static_cast<S*>(workspace)};
    return launch_in<S>(plans, whole, gradients, stream);
  };
  return plans.single ? run(float()) : run(double());
}

}  // namespace fusedopt::cuda
