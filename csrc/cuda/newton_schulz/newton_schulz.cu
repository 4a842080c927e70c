// Newton–Schulz on a GPU (Jordan 2024; Gram form: Dao-AILab 2026): the schedule as a sequence of launches, each for a
// batch of matrices of one shape. X has its short side as rows, n x m.
//
//   X = G / ||G||, and then in each step    A = XX'    B = bA + cAA    X <- aX + BX
//   Gram form: R = XX', Q = I; each step    Z = bR + cRR    Q <- aQ + QZ    R <- (aI + Z) R (aI + Z);   at last QX
//
// T steps are T (3 m n^2 + n^3) flops; in the Gram form 3 m n^2 + (4 T - 3) n^3, and each restart adds 3 (m - n) n^2.
// Products read and write the schedule's arithmetic and add up in float32 (float64 for float64); all is float64 where
// the short side has at most 8 elements. Launches: 4 and, for each step, 3; in the Gram form about 5.
#define FUSEDOPT_TARGET cuda
#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "cuda/newton_schulz.h"
#include "cuda/newton_schulz/outside.h"
#include "cuda/newton_schulz/product.h"

namespace fusedopt::cuda {
namespace {

constexpr int64_t kMaxElements = int64_t(1) << 26;  // of a batch, unless a matrix has more
constexpr int64_t kLongest = int64_t(1) << 30;      // side: products count rows and columns in 32 bits

struct Group {  // matrices that are launched together, by index
  int64_t n, m;
  bool gram;
  std::vector<int64_t> indices;

  // With a few rows one singular value may be all there is, and rounding is not averaged: float64 costs little there.
  DType arithmetic(const NewtonSchulzSchedule& schedule) const {
    return n <= 8 ? DType::kFloat64 : schedule.arithmetic;
  }
};

std::vector<Group> groups_of(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule) {
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> by_shape;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = std::min(matrices[i].rows, matrices[i].columns);
    if (n > 0) by_shape[{n, std::max(matrices[i].rows, matrices[i].columns)}].push_back(i);
  }
  std::vector<Group> groups;
  for (const auto& [shape, indices] : by_shape) {
    const auto [n, m] = shape;
    const int64_t size = std::clamp<int64_t>(kMaxElements / n / m, 1, kMaxMatrices);
    for (size_t at = 0; at < indices.size(); at += size)
      groups.push_back(
          {n, m, schedule.gram(n, m), {indices.begin() + at, indices.begin() + std::min(at + size, indices.size())}});
  }
  return groups;
}

template <typename Codec>
class Iteration {
 public:
  Iteration(const Group& group, const NewtonSchulzMatrix* matrices, const NewtonSchulzSchedule& schedule,
            char* workspace, cudaStream_t stream)
      : group_(group),
        matrices_(matrices),
        schedule_(schedule),
        batch_(group.n, group.m, int64_t(group.indices.size()), group.gram, workspace),
        stream_(stream) {}

  Status run() {
    then(launch_normalize(outer(false), batch_, schedule_.dtype, stream_));
    if (group_.gram)
      iterate_gram();
    else
      iterate();
    if (status_) then(launch_store(outer(true), batch_, x_, stream_));
    return status_;
  }

 private:
  using Stored = typename Batch<Codec>::Stored;
  using S = typename Batch<Codec>::S;

  void then(Status status) { status_ = status; }

  OuterMatrices outer(bool out) const {
    OuterMatrices result;
    OuterMatrix* to = result.items;
    for (const int64_t index : group_.indices) {
      const NewtonSchulzMatrix& g = matrices_[index];
      OuterMatrix own = out ? OuterMatrix{g.out, g.out_stride, g.out_column_stride, g.out_dtype}
                            : OuterMatrix{const_cast<void*>(g.in), g.in_stride, g.in_column_stride, g.in_dtype};
      if (g.rows > g.columns) std::swap(own.row, own.column);
      *to++ = own;
    }
    return result;
  }

  void multiply(Product<Codec> product, bool symmetric) {
    if (!status_) return;
    product.c = product.beta == 0 ? nullptr : product.c;
    then(launch_product(product, symmetric, batch_.count, stream_));
  }
  const Scale<Codec>* scales() const { return scaled_ ? nullptr : batch_.scales; }

  // out <- alpha L R + beta C, all n x n and symmetric.
  void multiply_squares(const Stored* left, const Stored* right, S alpha, const Stored* c, S beta, Stored* out) {
    const int64_t stride = batch_.square_stride, size = batch_.square_size();
    const auto n = int32_t(batch_.n);
    multiply({left, right, c, out, stride, stride, stride, size, size, size, n, n, n, alpha, beta, nullptr, 1}, true);
  }
  // out <- XX'
  void multiply_gram(Stored* out) {
    const int64_t stride = batch_.x_stride, size = batch_.x_size();
    const auto n = int32_t(batch_.n), m = int32_t(batch_.m);
    multiply({x_, x_, nullptr, out, stride, stride, batch_.square_stride, size, size, batch_.square_size(), n, n, m,
              S(1), S(0), scales(), 2},
             true);
  }
  // X <- alpha L X + beta X
  void multiply_x(const Stored* left, S alpha, S beta) {
    const int64_t stride = batch_.x_stride, size = batch_.x_size();
    Stored* const out = batch_.x[x_ == batch_.x[0]];
    multiply({left, x_, x_, out, batch_.square_stride, stride, stride, batch_.square_size(), size, size,
              int32_t(batch_.n), int32_t(batch_.m), int32_t(batch_.n), alpha, beta, scales(), 1},
             false);
    x_ = out;
    scaled_ = true;
  }
  // out <- factor * from + diagonal * I
  void scale_square(const Stored* from, S factor, S diagonal, Stored* out) {
    if (status_) then(launch_scale_square(batch_, from, factor, diagonal, out, stream_));
  }

  void iterate() {
    Stored *const gram = batch_.squares[0], *const polynomial = batch_.squares[1];
    for (const NewtonSchulzStep& step : schedule_.steps) {
      multiply_gram(gram);
      if (step.c == 0) {
        multiply_x(gram, S(step.b), S(step.a));
        continue;
      }
      multiply_squares(gram, gram, S(step.c), gram, S(step.b), polynomial);
      multiply_x(polynomial, S(1), S(step.a));
    }
  }

  void iterate_gram() {
    Stored *const r = batch_.squares[0], *const z = batch_.squares[1], *const rz = batch_.squares[4];
    Stored *q = batch_.squares[2], *next = batch_.squares[3];
    const std::vector<NewtonSchulzStep>& steps = schedule_.steps;
    bool identity = true;  // Q is I, and not written
    multiply_gram(r);
    for (size_t t = 0; t < steps.size(); ++t) {
      const NewtonSchulzStep& step = steps[t];
      if (step.restart_before && !identity) {
        multiply_x(q, S(1), S(0));
        multiply_gram(r);
        identity = true;
      }
      if (step.c == 0)
        scale_square(r, S(step.b), S(0), z);
      else
        multiply_squares(r, r, S(step.c), r, S(step.b), z);
      if (identity) {
        scale_square(z, S(1), S(step.a), q);
      } else {
        multiply_squares(q, z, S(1), q, S(step.a), next);
        std::swap(q, next);
      }
      identity = false;
      if (t + 1 == steps.size() || steps[t + 1].restart_before) continue;
      multiply_squares(r, z, S(1), r, S(step.a), rz);
      multiply_squares(z, rz, S(1), rz, S(step.a), r);
    }
    multiply_x(q, S(1), S(0));
  }

  const Group& group_;
  const NewtonSchulzMatrix* const matrices_;
  const NewtonSchulzSchedule& schedule_;
  const Batch<Codec> batch_;
  const cudaStream_t stream_;
  Stored* x_ = batch_.x[0];
  bool scaled_ = false;  // X has been multiplied by its scale
  Status status_;
};

int64_t bytes_of(const Group& group, const NewtonSchulzSchedule& schedule) {
  int64_t bytes = 0;
  with_codec(group.arithmetic(schedule), [&](auto codec) {
    bytes = Batch<decltype(codec)>(group.n, group.m, int64_t(group.indices.size()), group.gram, nullptr).bytes;
  });
  return bytes;
}

}  // namespace

int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix* matrices, int64_t count,
                                      const NewtonSchulzSchedule& schedule) {
  int64_t largest = 0;
  for (const Group& group : groups_of(matrices, count, schedule))
    largest = std::max(largest, bytes_of(group, schedule));
  return largest;
}

Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule,
                            void* workspace, cudaStream_t stream) {
  const std::vector<Group> groups = groups_of(matrices, count, schedule);
  for (const Group& group : groups)
    if (group.m > kLongest) return {"a matrix has a side of more than 2^30 elements"};
  Status status;
  for (const Group& group : groups) {
    with_codec(group.arithmetic(schedule), [&](auto codec) {
      status = Iteration<decltype(codec)>(group, matrices, schedule, static_cast<char*>(workspace), stream).run();
    });
    if (!status) break;
  }
  return status;
}

}  // namespace fusedopt::cuda
