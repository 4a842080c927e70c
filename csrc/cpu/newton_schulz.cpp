// Newton–Schulz of one matrix (Jordan 2024; Gram form: Dao-AILab 2026). X has its short side as rows, n x m.
//
//   X = G / ||G||, and then in each step    A = XX'    B = bA + cAA    X <- aX + BX
//   Gram form: R = XX', Q = I; each step    Z = bR + cRR    Q <- aQ + QZ    R <- (aI + Z) R (aI + Z);   at last QX
//
// Symmetric products cost half: T steps are T (3 m n^2 + n^3) flops, in the Gram form 3 m n^2 + (4 T - 3) n^3; without
// symmetry it would be T (4 m n^2 + 2 n^3). Compiled once per instruction set.
//
// In bfloat16 (where products of it are an instruction, and the matrix is rounded to it anyway) X, A, B, R, Q and Z are
// rounded as they are stored, at twice float's rate; squares keep their diagonals in float, and X its exact bits: it is
// scaled by a power of two, and the rest of 1 / ||G|| goes into the first step's coefficients.
#include "cpu/newton_schulz.h"

#include "cpu/entries.h"
#include "cpu/gemm.h"
#include "cpu/newton_schulz_io.h"
#include "cpu/threads.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

constexpr int64_t kRowsPerChunk = 32;

template <typename T>
struct Square {  // n x n, symmetric
  T* at;
  Sum<T>* diagonal;  // where kDiagonalApart
};

template <typename T>
struct Buffers {                  // within the workspace
  int64_t stride, square_stride;  // of X, of the n x n matrices
  T *x, *panels;
  Square<T> squares[5];
  double* sums;  // one for each row
  int64_t bytes = 0;

  Buffers(int64_t rows, int64_t columns, bool gram, char* workspace) {
    constexpr int64_t kLine = 64 / sizeof(T);
    // An odd number of cache lines, since rows apart by a power of two would share cache sets.
    const auto padded = [](int64_t n) { return (round_up(n, kLine) / kLine | 1) * kLine; };
    const auto take = [&](int64_t count, auto element) {
      char* const at = workspace + bytes;
      bytes += round_up(count * int64_t(sizeof element), 64);
      return reinterpret_cast<decltype(element)*>(at);
    };
    const int64_t readable = round_up(rows, kTileRows), width = kTileColumns<T>;
    const int64_t row_panels = round_up(rows, width) * round_up(columns, kPair<T>),
                  column_panels = round_up(columns, width) * round_up(rows, kPair<T>);
    stride = padded(columns);
    square_stride = padded(rows);
    x = take(readable * stride, T());
    panels = take(row_panels > column_panels ? row_panels : column_panels, T());
    for (int i = 0; i < (gram ? 5 : 2); ++i)
      squares[i] = {take(readable * square_stride, T()), kDiagonalApart<T> ? take(rows, Sum<T>()) : nullptr};
    sums = take(rows, double());
  }
};

template <typename T>
class Iteration {
  using S = Sum<T>;

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
    scale_x(__builtin_sqrt(total));
    clear_padding(b_.x, b_.stride, m_);
    for (int i = 0; i < (task_.gram ? 5 : 2); ++i) clear_padding(b_.squares[i].at, b_.square_stride, n_);
    return true;
  }

  // X <- X / norm; what would round bfloat16 is left to step_at.
  void scale_x(double norm) {
    double scale = 1 / norm;
    if constexpr (kDiagonalApart<T>) {
      scale = power_of_two<double>(-1 - exponent_of(norm));
      unscaled_ = 1 / (norm * scale);
    }
    for_rows([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < m_; ++j) {
          T* const x = b_.x + i * b_.stride + j;
          write(x, S(double(read<S>(x)) * scale));
        }
    });
  }

  // Tiles read rows and, in pairs, a column that are not there.
  void clear_padding(T* x, int64_t stride, int64_t columns) {
    for (int64_t i = n_ * stride; i < round_up(n_, kTileRows) * stride; ++i) x[i] = T();
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = columns; j < round_up(columns, kPair<T>); ++j) x[i * stride + j] = T();
  }

  void multiply(const Product<T>& product) {
    parallel_for(product.blocks(), threads_, [&](int64_t block) { multiply_block(product, block); });
  }

  // out <- alpha L R + beta add, all n x n and symmetric; R is what was packed.
  void multiply_squares(const Square<T>& left, S alpha, const Square<T>& add, S beta, const Square<T>& out) {
    multiply({left.at,
              b_.panels,
              add.at,
              out.at,
              n_,
              n_,
              n_,
              b_.square_stride,
              b_.square_stride,
              alpha,
              beta,
              true,
              {packed_.at, left.diagonal, packed_.diagonal, add.diagonal, out.diagonal}});
  }
  void pack_square(const Square<T>& from) {
    packed_ = from;
    parallel_for((n_ + kTileColumns<T> - 1) / kTileColumns<T>, threads_,
                 [&](int64_t panel) { pack_columns(from.at, b_.square_stride, n_, n_, panel, b_.panels); });
  }

  // out <- XX'
  void multiply_gram(const Square<T>& out) {
    parallel_for((n_ + kTileColumns<T> - 1) / kTileColumns<T>, threads_,
                 [&](int64_t panel) { pack_rows(b_.x, b_.stride, m_, n_, panel, b_.panels); });
    multiply({b_.x,
              b_.panels,
              nullptr,
              out.at,
              n_,
              n_,
              m_,
              b_.stride,
              b_.square_stride,
              S(1),
              S(0),
              true,
              {nullptr, nullptr, nullptr, nullptr, out.diagonal}});
  }

  // X <- alpha L X + beta X
  void multiply_x(const Square<T>& left, S alpha, S beta) {
    parallel_for((m_ + kTileColumns<T> - 1) / kTileColumns<T>, threads_,
                 [&](int64_t panel) { pack_columns(b_.x, b_.stride, n_, m_, panel, b_.panels); });
    multiply({left.at,
              b_.panels,
              beta == S(0) ? nullptr : b_.x,
              b_.x,
              n_,
              m_,
              n_,
              b_.square_stride,
              b_.stride,
              alpha,
              beta,
              false,
              {b_.x, left.diagonal, nullptr, nullptr, nullptr}});
  }

  NewtonSchulzStep step_at(int64_t t) const {
    NewtonSchulzStep step = task_.steps[t];
    if (t > 0) return step;
    const double square = unscaled_ * unscaled_;
    step.a *= unscaled_;
    step.b *= unscaled_ * square;
    step.c *= unscaled_ * square * square;
    return step;
  }

  void iterate() {
    const Square<T>&gram = b_.squares[0], &polynomial = b_.squares[1];
    for (int64_t t = 0; t < task_.count; ++t) {
      const NewtonSchulzStep step = step_at(t);
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
    const Square<T>&r = b_.squares[0], &z = b_.squares[1], &rz = b_.squares[4];
    Square<T> q = b_.squares[2], next = b_.squares[3];
    bool identity = true;  // Q is I, and not written
    multiply_gram(r);
    for (int64_t t = 0; t < task_.count; ++t) {
      const NewtonSchulzStep step = step_at(t);
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
        const Square<T> last = q;
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
  void scale_square(const Square<T>& from, S factor, S diagonal, const Square<T>& out) {
    for_rows([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i * b_.square_stride;
        for (int64_t j = 0; j < n_; ++j) write(out.at + row + j, factor * read<S>(from.at + row + j));
        if constexpr (kDiagonalApart<T>)
          out.diagonal[i] = factor * from.diagonal[i] + diagonal;
        else
          out.at[row + i] += diagonal;
      }
    });
  }

  const NewtonSchulzTask& task_;
  const NewtonSchulzMatrix& g_;
  const Turn turn_;
  const Sides sides_;
  const int64_t n_, m_;
  const Buffers<T> b_;
  const int threads_;
  Square<T> packed_ = {};
  double unscaled_ = 1;  // X / ||X|| is X times this
};

// Calls f(a number of the type that a matrix is computed in).
template <typename F>
auto with_operand(int64_t shorter, DType arithmetic, const F& f) {
  // With a few rows one singular value may be all there is, and rounding is not averaged: double costs nothing there.
  if (arithmetic == DType::kFloat64 || shorter <= 8) return f(double());
#if defined(__AVX512BF16__)
  if (arithmetic == DType::kBFloat16) return f(Brain());
#endif
  return f(float());
}

}  // namespace

int64_t newton_schulz_bytes(int64_t rows, int64_t columns, DType arithmetic, bool gram) {
  const int64_t n = rows < columns ? rows : columns, m = rows < columns ? columns : rows;
  return with_operand(n, arithmetic, [&](auto x) { return Buffers<decltype(x)>(n, m, gram, nullptr).bytes; });
}

void newton_schulz(const NewtonSchulzTask& task, void* workspace, int threads) {
  const NewtonSchulzMatrix& g = *task.matrix;
  with_operand(g.rows < g.columns ? g.rows : g.columns, task.arithmetic,
               [&](auto x) { Iteration<decltype(x)>(task, static_cast<char*>(workspace), threads).run(); });
}

}  // namespace fusedopt::FUSEDOPT_TARGET
