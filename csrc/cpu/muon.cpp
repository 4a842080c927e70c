// Muon on the CPU: the formulas of math/muon.h around Newton-Schulz, over the matrices of a wave. Compiled once per
// instruction set.
//
// Before and after the products 28 bytes per element in fp32 and a handful of operations: memory-bound beyond the
// caches. NorMuon's sums are taken in double, lane by lane in a fixed order: one conversion and one product an element.
#include "cpu/muon.h"

#include "cpu/elementwise.h"
#include "cpu/entries.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

using Role = MuonRole;
constexpr int64_t kAhead = 512;  // bytes ahead of each stream to ask for

// ---- the two element-wise passes, as the driver has them

template <typename S, int kStreams>
struct StepScalars {
  MuonScalars<Pack<S>> k;
  Pack<S> rate;
  int64_t ahead[kStreams];
};

// Streams: u, gradient, momentum.
struct Before {
  static constexpr int kRoles = 3;
  static constexpr bool kPipelined = false;
  static constexpr unsigned kOptional = 0;
  static constexpr unsigned kWrites = 1u << 0 | 1u << 2;
  template <typename S>
  using Begun = Pack<S>;
  template <typename S>
  using Middle = Pack<S>;
  template <typename S>
  using Scalars = StepScalars<S, kRoles>;
  const MuonScalars<double>& scalars;

  template <typename S>
  Scalars<S> prepare() const {
    return {scalars.as<S>().template as<Pack<S>>(), Pack<S>(S(0)), {kAhead, kAhead, kAhead}};
  }
  template <typename S>
  static FUSEDOPT_INLINE Pack<S> begin(Pack<S> grad, Pack<S>& momentum, bool, const Scalars<S>& s) {
    return muon_momentum(grad, momentum, s.k);
  }
  template <typename S>
  static FUSEDOPT_INLINE Pack<S> middle(Pack<S> u, const Scalars<S>&) {
    return u;
  }
  template <typename S>
  static FUSEDOPT_INLINE void finish(Pack<S>& to, Pack<S> u, const Scalars<S>&) {
    to = u;
  }
};

// Streams: parameter, o.
struct After {
  static constexpr int kRoles = 2;
  static constexpr bool kPipelined = false;
  static constexpr unsigned kOptional = 0;
  static constexpr unsigned kWrites = 1u << 0;
  template <typename S>
  using Begun = Pack<S>;
  template <typename S>
  using Middle = Pack<S>;
  template <typename S>
  using Scalars = StepScalars<S, kRoles>;
  const MuonScalars<double>& scalars;
  double rate;

  template <typename S>
  Scalars<S> prepare() const {
    return {scalars.as<S>().template as<Pack<S>>(), Pack<S>(S(rate)), {kAhead, kAhead}};
  }
  template <typename S>
  static FUSEDOPT_INLINE Pack<S> begin(Pack<S> o, bool, const Scalars<S>&) {
    return o;
  }
  template <typename S>
  static FUSEDOPT_INLINE Pack<S> middle(Pack<S> o, const Scalars<S>&) {
    return o;
  }
  template <typename S>
  static FUSEDOPT_INLINE void finish(Pack<S>& param, Pack<S> o, const Scalars<S>& s) {
    param = muon_param(param, o, s.rate, s.k);
  }
};

// ---- one tensor's elements, as they lie or through tiles

// Whether packs of S read this dtype as it lies.
template <typename S>
bool in_place(DType dtype) {
  return (dtype == DType::kFloat64) == (sizeof(S) == sizeof(double));
}

template <typename S, typename F>  // calls f(codec) for such a dtype
void with_pack_codec(DType dtype, F f) {
  if constexpr (sizeof(S) == sizeof(double)) {
    f(PackPlain<double>());
  } else {
    switch (dtype) {
      case DType::kFloat32: return f(PackPlain<float>());
      case DType::kBFloat16: return f(PackBFloat16<LaneOrder::kLinear>());
      default: return f(PackFloat16());
    }
  }
}

struct FlatRecord {  // a flat row in strides, as RowLayout reads them: one dimension, stride 1 in every role
  int64_t record[2 + kMaxRoles];

  explicit FlatRecord(int64_t numel) : record{1, numel} {
    for (int role = 0; role < kMaxRoles; ++role) record[2 + role] = 1;
  }
};

template <typename S>  // of the arithmetic
class Tensor {
  using Plain = PackPlain<S>;

 public:
  Tensor(const TensorTable& table, const TensorRow& row)
      : row_(row), flat_(row.numel), layout_(row.layout == kFlat ? flat_.record : table.layouts + row.layout) {}
  Tensor(const Tensor&) = delete;

  // Elements [at, at + n) in row-major order.
  void before(const Before& before, int64_t at, int64_t n, S* u) const {
    if (lies_ready(Role::kGrad) && lies_ready(Role::kMomentum)) {
      with_pack_codec<S>(row_.dtype[Role::kGrad], [&](auto grad) {
        with_pack_codec<S>(row_.dtype[Role::kMomentum], [&](auto momentum) {
          void* const data[] = {u, address(Role::kGrad, at), address(Role::kMomentum, at)};
          UnitRunner<Before, Plain, decltype(grad), decltype(momentum)>::run(before, data, n);
        });
      });
      return;
    }
    alignas(64) S grad[kTile], momentum[kTile];
    for_each_tile(at, n, [&](int64_t begin, int64_t size) {
      load_tile(row_, layout_, Role::kGrad, begin, size, grad);
      load_tile(row_, layout_, Role::kMomentum, begin, size, momentum);
      void* const data[] = {u + (begin - at), grad, momentum};
      UnitRunner<Before, Plain, Plain, Plain>::run(before, data, size);
      store_tile(row_, layout_, Role::kMomentum, begin, size, momentum);
    });
  }

  void after(const After& after, int64_t at, int64_t n, S* o) const {
    if (lies_ready(Role::kParam)) {
      with_pack_codec<S>(row_.dtype[Role::kParam], [&](auto param) {
        void* const data[] = {address(Role::kParam, at), o};
        UnitRunner<After, decltype(param), Plain>::run(after, data, n);
      });
      return;
    }
    alignas(64) S param[kTile];
    for_each_tile(at, n, [&](int64_t begin, int64_t size) {
      load_tile(row_, layout_, Role::kParam, begin, size, param);
      void* const data[] = {param, o + (begin - at)};
      UnitRunner<After, Plain, Plain>::run(after, data, size);
      store_tile(row_, layout_, Role::kParam, begin, size, param);
    });
  }

 private:
  bool lies_ready(int role) const { return row_.layout == kFlat && in_place<S>(row_.dtype[role]); }
  void* address(int role, int64_t at) const {
    return static_cast<char*>(row_.data[role]) + at * size_of(row_.dtype[role]);
  }
  template <typename F>
  static void for_each_tile(int64_t at, int64_t n, F f) {
    for (int64_t end = at + n; at < end; at += kTile) f(at, end - at < kTile ? end - at : kTile);
  }

  const TensorRow& row_;
  const FlatRecord flat_;
  RowLayout layout_;
};

// ---- walks

// Calls f(matrix's number in the wave, begin, end) for what lies in a range, numbered by `starts`.
template <typename F>
void for_each_matrix(const MuonWave& wave, const int64_t* starts, int64_t begin, int64_t end, F f) {
  int64_t low = 0, high = wave.last - wave.first;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (starts[middle] <= begin ? low : high) = middle;
  }
  for (int64_t i = low; i < wave.last - wave.first && starts[i] < end; ++i) {
    const int64_t from = begin > starts[i] ? begin - starts[i] : 0, stop = end < starts[i + 1] ? end : starts[i + 1];
    if (from < stop - starts[i]) f(i, from, stop - starts[i]);
  }
}

// Calls f(row, place in the tensor, place in the matrix, length) for the rows, or all at once where they are `joined`.
template <typename F>
void for_each_row(const MuonMatrix& matrix, bool joined, int64_t begin, int64_t end, F f) {
  if (joined && matrix.joined()) return f(0, matrix.offset + begin, begin, end - begin);
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / matrix.columns, column = at % matrix.columns, left = matrix.columns - column;
    const int64_t n = left < end - at ? left : end - at;
    f(row, matrix.offset + row * matrix.stride + column, at, n);
    at += n;
  }
}

// The sum of lanes, by halves.
template <int64_t kLanes>
double add_lanes(double (&lanes)[kLanes]) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <typename S>
double sum_of_squares(const S* from, int64_t n) {
  constexpr int64_t kLanes = NorMuonOrder::kRowLanes;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += double(from[i + lane]) * double(from[i + lane]);
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += double(from[i]) * double(from[i]);
  return add_lanes(lanes);
}

template <typename S>
double sum_of_row(const S* row, int64_t columns) {
  constexpr int64_t kPiece = NorMuonOrder::kRowPiece;
  double sum = 0;
  for (int64_t at = 0; at < columns; at += kPiece)
    sum += sum_of_squares(row + at, at + kPiece < columns ? kPiece : columns - at);
  return sum;
}

// Of n columns, at most kNorMuonChunk.
template <typename S>
void sum_columns(const S* from, int64_t rows, int64_t columns, int64_t n, double* sums) {
  constexpr int64_t kPiece = NorMuonOrder::kColumnPiece;
  for (int64_t c = 0; c < n; ++c) sums[c] = 0;
  for (int64_t row = 0; row < rows;) {
    double piece[kNorMuonChunk] = {};
    for (const int64_t end = row + kPiece < rows ? row + kPiece : rows; row < end; ++row)
      for (int64_t c = 0; c < n; ++c) piece[c] += double(from[row * columns + c]) * double(from[row * columns + c]);
    for (int64_t c = 0; c < n; ++c) sums[c] += piece[c];
  }
}

template <typename F>  // calls f(S) with the number type of a wave's arithmetic
void with_arithmetic(const MuonWave& wave, F f) {
  if (wave.wide)
    f(double());
  else
    f(float());
}

template <typename S>
S* values(const MuonWave& wave, int64_t i) {
  return static_cast<S*>(wave.values) + wave.element_starts[i];
}

template <typename S>
void before(const MuonWave& wave, int64_t begin, int64_t end) {
  for_each_matrix(wave, wave.element_starts, begin, end, [&](int64_t i, int64_t from, int64_t stop) {
    const MuonMatrix& matrix = wave.matrices[wave.first + i];
    const TensorRow& row = wave.table.rows[matrix.row];
    const Tensor<S> tensor(wave.table, row);
    S* const u = values<S>(wave, i);
    for_each_row(matrix, true, from, stop, [&](int64_t, int64_t at, int64_t place, int64_t n) {
      tensor.before({wave.scalars[row.scalars]}, at, n, u + place);
    });
  });
}

template <typename S>
void sums(const MuonWave& wave, int64_t begin, int64_t end) {
  for_each_matrix(wave, wave.line_starts, begin, end, [&](int64_t i, int64_t from, int64_t stop) {
    const MuonMatrix& matrix = wave.matrices[wave.first + i];
    const S* const o = values<S>(wave, i);
    double* const sums = wave.lines + wave.line_starts[i];
    if (matrix.by_column) return sum_columns(o + from, matrix.rows, matrix.columns, stop - from, sums + from);
    for (int64_t r = from; r < stop; ++r) sums[r] = sum_of_row(o + r * matrix.columns, matrix.columns);
  });
}

template <typename S>
void after(const MuonWave& wave, int64_t begin, int64_t end) {
  for_each_matrix(wave, wave.element_starts, begin, end, [&](int64_t i, int64_t from, int64_t stop) {
    const MuonMatrix& matrix = wave.matrices[wave.first + i];
    const TensorRow& row = wave.table.rows[matrix.row];
    const Tensor<S> tensor(wave.table, row);
    S* const o = values<S>(wave, i);
    const double* const lines = wave.lines ? wave.lines + wave.line_starts[i] : nullptr;
    for_each_row(matrix, !lines, from, stop, [&](int64_t r, int64_t at, int64_t place, int64_t n) {
      double rate = wave.scalars[row.scalars].rate * matrix.scale;
      if (lines && matrix.by_column) {
        const double* const scales = lines + (place - r * matrix.columns);
        for (int64_t j = 0; j < n; ++j) o[place + j] = S(o[place + j] * scales[j]);
      } else if (lines) {
        rate *= lines[r];
      }
      tensor.after({wave.scalars[row.scalars], rate}, at, n, o + place);
    });
  });
}

}  // namespace

// Elements [begin, end) of a wave: gradient and momentum to u.
void muon_before(const MuonWave& wave, int64_t begin, int64_t end) {
  with_arithmetic(wave, [&](auto s) { before<decltype(s)>(wave, begin, end); });
}

// Lines [begin, end), at most kNorMuonChunk: their sums of squares.
void normuon_sums(const MuonWave& wave, int64_t begin, int64_t end) {
  with_arithmetic(wave, [&](auto s) { sums<decltype(s)>(wave, begin, end); });
}

// Matrices [begin, end) of a wave: from sums to scales; updates v.
void normuon_scales(const MuonWave& wave, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const MuonMatrix& matrix = wave.matrices[wave.first + i];
    const TensorRow& row = wave.table.rows[matrix.row];
    float* const row_sq = static_cast<float*>(row.data[Role::kRowSq]) + matrix.first_line;
    double* const lines = wave.lines + wave.line_starts[i];
    const double count = double(matrix.numel() / matrix.lines());
    double before[NorMuonOrder::kLineLanes] = {}, after[NorMuonOrder::kLineLanes] = {};  // squared norms
    for (int64_t l = 0; l < matrix.lines(); ++l) {
      double v = row_sq[l];
      const double sum = lines[l], scale = normuon_row(v, sum, count, wave.scalars[row.scalars].beta2);
      row_sq[l] = float(v);
      lines[l] = scale;
      before[l % NorMuonOrder::kLineLanes] += sum;
      after[l % NorMuonOrder::kLineLanes] += sum * scale * scale;
    }
    const double keep = sqrt(add_lanes(before)) / (sqrt(add_lanes(after)) + kNorMuonEps);
    for (int64_t l = 0; l < matrix.lines(); ++l) lines[l] *= keep;
  }
}

// Elements [begin, end) of a wave: o to the parameter.
void muon_after(const MuonWave& wave, int64_t begin, int64_t end) {
  with_arithmetic(wave, [&](auto s) { after<decltype(s)>(wave, begin, end); });
}

}  // namespace fusedopt::FUSEDOPT_TARGET
