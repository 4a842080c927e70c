// Newton–Schulz of one matrix (Jordan 2024; Gram form: Dao-AILab 2026). X has its short side as rows, n x m.
//
//   X = G / ||G||, and then in each step    A = XX'    B = bA + cAA    X <- aX + BX
//   Gram form: R = XX', Q = I; each step    Z = bR + cRR    Q <- aQ + QZ    R <- (aI + Z) R (aI + Z);   at last QX
//
// Symmetric products cost half: T steps are T (3 m n^2 + n^3) flops, in the Gram form 3 m n^2 + (4 T - 3) n^3; without
// symmetry it would be T (4 m n^2 + 2 n^3). Compiled once per instruction set.
#include "cpu/newton_schulz.h"

#include "cpu/entries.h"
#include "cpu/gemm.h"
#include "cpu/newton_schulz_io.h"
#include "cpu/threads.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

constexpr int64_t kRowsPerChunk = 32;

template <typename S>
struct Buffers {                  // within the workspace
  int64_t stride, square_stride;  // of X, of the n x n matrices
  S *x, *panels, *squares[5];
  double* sums;  // one for each row
  int64_t bytes = 0;

  Buffers(int64_t rows, int64_t columns, bool gram, char* workspace) {
    constexpr int64_t kLine = 64 / sizeof(S);
    // An odd number of cache lines, since rows apart by a power of two would share cache sets.
    const auto padded = [](int64_t n) { return (round_up(n, kLine) / kLine | 1) * kLine; };
    const auto take = [&](int64_t count) {
      char* const at = workspace + bytes;
      bytes += round_up(count * int64_t(sizeof(S)), 64);
      return reinterpret_cast<S*>(at);
    };
    const int64_t readable = round_up(rows, kTileRows), width = kTileColumns<S>;
    const int64_t row_panels = round_up(rows, width) * columns, column_panels = round_up(columns, width) * rows;
    stride = padded(columns);
    square_stride = padded(rows);
    x = take(readable * stride);
    panels = take(row_panels > column_panels ? row_panels : column_panels);
    for (int i = 0; i < (gram ? 5 : 2); ++i) squares[i] = take(readable * square_stride);
    sums = reinterpret_cast<double*>(take(rows * int64_t(sizeof(double) / sizeof(S))));
  }
};

template <typename S>
class Iteration {
 public:
  Iteration(const NewtonSchulzTask& task, char* workspace, int threads)
      : task_(task),
        g_(*task.matrix),
        turn_(turn_of(g_)),
        sides_(g_, turn_ == Turn::kTransposed),
        n_(sides_.rows),
        m_(sides_.columns),
        b_(n_, m_, task.gram, workspace),
        threads_(threads) {}

  void run() {
    if (!load_normalized()) return;
    if (task_.gram)
      iterate_gram();
    else
      iterate();
    if (turn_ == Turn::kSymmetric) mirror_x();
    for_rows([&](int64_t first, int64_t last) { store_rows(g_, sides_, first, last, b_.x, b_.stride); });
  }

 private:
  // A symmetric matrix has a symmetric result, which BX as computed is but for rounding.
  void mirror_x() {
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = i + 1; j < n_; ++j) b_.x[j * b_.stride + i] = b_.x[i * b_.stride + j];
  }

  template <typename F>
  void for_rows(const F& body) {
    parallel_for((n_ + kRowsPerChunk - 1) / kRowsPerChunk, threads_, [&](int64_t chunk) {
      const int64_t first = chunk * kRowsPerChunk;
      body(first, first + kRowsPerChunk < n_ ? first + kRowsPerChunk : n_);
    });
  }

  // False: there is nothing to iterate on, the result is written.
  bool load_normalized() {
    for_rows([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) b_.sums[i] = 0;
      b_.sums[first] = largest_magnitude(g_, sides_, first, last);
    });
    double largest = 0;
    for (int64_t i = 0; i < n_; ++i) largest = maximum(largest, b_.sums[i]);
    if (!(largest > 0 && largest - largest == 0)) {
      const float result = largest == 0 ? 0.0f : __builtin_nanf("");
      for_rows([&](int64_t first, int64_t last) { fill_rows(g_, sides_, first, last, result); });
      return false;
    }
    const int exponent = kTopExponent - exponent_of(largest);
    for_rows([&](int64_t first, int64_t last) {
      load_rows(g_, sides_, task_.dtype, exponent, first, last, b_.x, b_.stride);
      for (int64_t i = first; i < last; ++i) b_.sums[i] = sum_of_squares(b_.x + i * b_.stride, m_);
    });
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) total += b_.sums[i];
    const double scale = 1 / __builtin_sqrt(total);
    for_rows([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < m_; ++j) b_.x[i * b_.stride + j] = S(double(b_.x[i * b_.stride + j]) * scale);
    });
    clear_rows_below(b_.x, b_.stride);
    for (int i = 0; i < (task_.gram ? 5 : 2); ++i) clear_rows_below(b_.squares[i], b_.square_stride);
    return true;
  }

  // Tiles read rows that are not there.
  void clear_rows_below(S* x, int64_t stride) {
    for (int64_t i = n_ * stride; i < round_up(n_, kTileRows) * stride; ++i) x[i] = 0;
  }

  void multiply(const Product<S>& product) {
    parallel_for(product.blocks(), threads_, [&](int64_t block) { multiply_block(product, block); });
  }

  // out <- alpha L R + beta add, all n x n and symmetric; R is what was packed.
  void multiply_squares(const S* left, S alpha, const S* add, S beta, S* out) {
    multiply({left, b_.panels, add, out, n_, n_, n_, b_.square_stride, b_.square_stride, alpha, beta, true});
  }
  void pack_square(const S* from) {
    parallel_for((n_ + kTileColumns<S> - 1) / kTileColumns<S>, threads_,
                 [&](int64_t panel) { pack_columns(from, b_.square_stride, n_, n_, panel, b_.panels); });
  }

  // out <- XX'
  void multiply_gram(S* out) {
    parallel_for((n_ + kTileColumns<S> - 1) / kTileColumns<S>, threads_,
                 [&](int64_t panel) { pack_rows(b_.x, b_.stride, m_, n_, panel, b_.panels); });
    multiply({b_.x, b_.panels, nullptr, out, n_, n_, m_, b_.stride, b_.square_stride, S(1), S(0), true});
  }

  // X <- alpha L X + beta X
  void multiply_x(const S* left, S alpha, S beta) {
    parallel_for((m_ + kTileColumns<S> - 1) / kTileColumns<S>, threads_,
                 [&](int64_t panel) { pack_columns(b_.x, b_.stride, n_, m_, panel, b_.panels); });
    multiply({left, b_.panels, beta == S(0) ? nullptr : b_.x, b_.x, n_, m_, n_, b_.square_stride, b_.stride, alpha,
              beta, false});
  }

  void iterate() {
    S *const gram = b_.squares[0], *const polynomial = b_.squares[1];
    for (int64_t t = 0; t < task_.count; ++t) {
      const NewtonSchulzStep& step = task_.steps[t];
      multiply_gram(gram);
      if (step.c == 0) {
        multiply_x(gram, S(step.b), S(step.a));
        continue;
      }
      pack_square(gram);
      multiply_squares(gram, S(step.c), gram, S(step.b), polynomial);
      multiply_x(polynomial, S(1), S(step.a));
    }
  }

  void iterate_gram() {
    S *r = b_.squares[0], *z = b_.squares[1], *q = b_.squares[2], *next = b_.squares[3], *const rz = b_.squares[4];
    bool identity = true;  // Q is I, and not written
    multiply_gram(r);
    for (int64_t t = 0; t < task_.count; ++t) {
      const NewtonSchulzStep& step = task_.steps[t];
      if (step.restart_before && !identity) {
        multiply_x(q, S(1), S(0));
        multiply_gram(r);
        identity = true;
      }
      if (step.c == 0) {
        scale_square(r, S(step.b), S(0), z);
      } else {
        pack_square(r);
        multiply_squares(r, S(step.c), r, S(step.b), z);
      }
      pack_square(z);
      if (identity) {
        scale_square(z, S(1), S(step.a), q);
      } else {
        multiply_squares(q, S(1), q, S(step.a), next);
        S* const last = q;
        q = next, next = last;
      }
      identity = false;
      if (t + 1 == task_.count || task_.steps[t + 1].restart_before) continue;
      multiply_squares(r, S(1), r, S(step.a), rz);
      pack_square(rz);
      multiply_squares(z, S(1), rz, S(step.a), r);
    }
    multiply_x(q, S(1), S(0));
  }

  // out <- factor * from + diagonal * I
  void scale_square(const S* from, S factor, S diagonal, S* out) {
    for_rows([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < n_; ++j) out[i * b_.square_stride + j] = factor * from[i * b_.square_stride + j];
        out[i * b_.square_stride + i] += diagonal;
      }
    });
  }

  const NewtonSchulzTask& task_;
  const NewtonSchulzMatrix& g_;
  const Turn turn_;
  const Sides sides_;
  const int64_t n_, m_;
  const Buffers<S> b_;
  const int threads_;
};

// With a few rows one singular value may be all there is, and rounding is not averaged: double costs nothing there.
bool is_double(int64_t shorter, DType dtype) { return dtype == DType::kFloat64 || shorter <= 8; }

}  // namespace

int64_t newton_schulz_bytes(int64_t rows, int64_t columns, DType dtype, bool gram) {
  const int64_t n = rows < columns ? rows : columns, m = rows < columns ? columns : rows;
  return is_double(n, dtype) ? Buffers<double>(n, m, gram, nullptr).bytes : Buffers<float>(n, m, gram, nullptr).bytes;
}

void newton_schulz(const NewtonSchulzTask& task, void* workspace, int threads) {
  char* const bytes = static_cast<char*>(workspace);
  const NewtonSchulzMatrix& g = *task.matrix;
  if (is_double(g.rows < g.columns ? g.rows : g.columns, task.dtype))
    Iteration<double>(task, bytes, threads).run();
  else
    Iteration<float>(task, bytes, threads).run();
}

}  // namespace fusedopt::FUSEDOPT_TARGET
