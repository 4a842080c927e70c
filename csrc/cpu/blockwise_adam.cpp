// Blockwise Adam on the CPU: the formula of math/blockwise_adam.h over a tensor table with blocks. Compiled once per
// instruction set.
//
// 20 bytes per element in fp32 (10 in bf16), and no division: memory-bound beyond the caches. The squares are added up
// in double, 2 conversions and 2 fma for 8 elements of AVX2, which the loads hide.
#include "math/blockwise_adam.h"

#include "cpu/blocks.h"
#include "cpu/elementwise.h"
#include "cpu/entries.h"
#include "cpu/squares.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

using Role = BlockwiseAdamRole;
constexpr int64_t kPrefetchBytes = 256;  // ahead of each stream, where nothing better is known
constexpr int64_t kTogether = 4;         // rows of a strip at once, in streams of their own
constexpr int64_t kLongRow = 128;        // columns of a strip from which on that pays

// ---- the update, as the element-wise driver has it

// Blocks of one coordinate: AdamW, its second moment stored as fp32.
struct EachCoordinate {
  static constexpr int kRoles = Role::kCount;
  static constexpr bool kPipelined = true;
  static constexpr unsigned kOptional = 0;
  static constexpr unsigned kWrites = 1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kBlockSq;
  const AdamWScalars<double>& scalars;

  template <typename S>
  AdamWScalars<Pack<S>> prepare() const {
    return scalars.as<Pack<S>>();
  }
  template <typename S>
  struct Begun {
    Pack<S> exp_avg, root;
  };
  template <typename S>
  using Middle = Pack<S>;
  template <typename S>
  static FUSEDOPT_INLINE Begun<S> begin(Pack<S> grad, Pack<S>& exp_avg, Pack<S>& sq, bool,
                                        const AdamWScalars<Pack<S>>& k) {
    Pack<S> no_maximum = sq;
    adamw_moments(grad, exp_avg, sq, no_maximum, false, k);
    return {exp_avg, adamw_root(sq, sq, false)};
  }
  template <typename S>
  static FUSEDOPT_INLINE Pack<S> middle(const Begun<S>& begun, const AdamWScalars<Pack<S>>& k) {
    return adamw_direction(begun.exp_avg, begun.root, k);
  }
  template <typename S>
  static FUSEDOPT_INLINE void finish(Pack<S>& param, Pack<S> direction, const AdamWScalars<Pack<S>>& k) {
    param = adamw_param(param, direction, k);
  }
};

template <typename V>
struct StepScalars {  // of AdamWScalars, what larger blocks need
  V lerp_weight, grad_factor, decay;
  V rate;  // of a single block
  bool lerp_from_grad;
  int64_t ahead[Role::kCount];  // bytes, see Region::set_ahead
};

// Elements of larger blocks.
struct Step {
  static constexpr bool kPipelined = false;
  static constexpr unsigned kOptional = 0;
  static constexpr unsigned kWrites = 1u << Role::kParam | 1u << Role::kExpAvg;
  const AdamWScalars<double>& scalars;
  const int64_t* ahead;
  double rate;

  template <typename S>
  StepScalars<Pack<S>> prepare() const {
    using V = Pack<S>;
    return {V(S(scalars.lerp_weight)), V(S(scalars.grad_factor)),        V(S(scalars.decay)), V(S(rate)),
            scalars.lerp_from_grad,    {ahead[0], ahead[1], ahead[2], 0}};
  }
};

// All of one block.
struct OneRate : Step {
  static constexpr int kRoles = Role::kBlockSq;
  template <typename S>
  using Begun = Pack<S>;  // the first moment
  template <typename S>
  using Middle = Pack<S>;

  template <typename V>
  static FUSEDOPT_INLINE V begin(V grad, V& exp_avg, bool, const StepScalars<V>& k) {
    adamw_first_moment(grad, exp_avg, k);
    return exp_avg;
  }
  template <typename V>
  static FUSEDOPT_INLINE V middle(V exp_avg, const StepScalars<V>&) {
    return exp_avg;
  }
  template <typename V>
  static FUSEDOPT_INLINE void finish(V& param, V exp_avg, const StepScalars<V>& k) {
    blockwise_adam_param(param, exp_avg, k.rate, k.decay);
  }
};

// In the place of the second moment, every element's rate.
struct OwnRates : Step {
  static constexpr int kRoles = Role::kCount;
  template <typename S>
  struct Begun {
    Pack<S> exp_avg, rate;
  };
  template <typename S>
  using Middle = Begun<S>;

  template <typename S>
  static FUSEDOPT_INLINE Begun<S> begin(Pack<S> grad, Pack<S>& exp_avg, Pack<S> rate, bool,
                                        const StepScalars<Pack<S>>& k) {
    adamw_first_moment(grad, exp_avg, k);
    return {exp_avg, rate};
  }
  template <typename S>
  static FUSEDOPT_INLINE Begun<S> middle(const Begun<S>& begun, const StepScalars<Pack<S>>&) {
    return begun;
  }
  template <typename S>
  static FUSEDOPT_INLINE void finish(Pack<S>& param, const Begun<S>& begun, const StepScalars<Pack<S>>& k) {
    blockwise_adam_param(param, begun.exp_avg, begun.rate, k.decay);
  }
};

template <typename Algorithm, typename Param, typename Grad, typename ExpAvg, typename Last>
void run_as(const Algorithm& algorithm, void* const* data, int64_t n) {
  if constexpr (Algorithm::kRoles == Role::kCount)
    UnitRunner<Algorithm, Param, Grad, ExpAvg, Last>::run(algorithm, data, n);
  else
    UnitRunner<Algorithm, Param, Grad, ExpAvg>::run(algorithm, data, n);
}

// Calls f with the codecs of a row's roles but the last. False: there are none for arithmetic in S.
template <typename S, typename F>
bool with_row_codecs(const TensorRow& row, F f) {
  return with_codecs<LaneOrder::kLinear>(row.dtype[Role::kParam], row.dtype[Role::kGrad], row.dtype[Role::kExpAvg],
                                         [&](auto param, auto grad, auto exp_avg) {
                                           if constexpr (std::is_same_v<typename decltype(param)::Value, S>)
                                             f(param, grad, exp_avg);
                                         });
}

template <typename T>
FUSEDOPT_INLINE void prefetch_lanes(const T* from) {
  for (int64_t line = 0; line < int64_t(kSumLanes * sizeof *from); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from + kPrefetchElements) + line, 0, 0);
}

// n elements of a block, a multiple of kSumLanes, and beside them as many of the next block's gradient: memory has the
// same to do all the time. The next block's squares come from memory, this one's gradient from a cache.
template <typename Param, typename Grad, typename ExpAvg, typename S>
void update_beside_sum(void* const* data, const void* next_grad, int64_t n, const StepScalars<Pack<S>>& scalars,
                       LaneSums* next) {
  const StepScalars<Pack<S>> k = scalars;  // copies that stay in registers
  LaneSums sums = *next;
  auto* const param = static_cast<typename Param::Stored*>(data[Role::kParam]);
  const auto* const grad = static_cast<const typename Grad::Stored*>(data[Role::kGrad]);
  auto* const exp_avg = static_cast<typename ExpAvg::Stored*>(data[Role::kExpAvg]);
  const auto* const from = static_cast<const typename Grad::Stored*>(next_grad);
  for (int64_t i = 0; i < n; i += kSumLanes) {
    prefetch_lanes(param + i);
    prefetch_lanes(exp_avg + i);
    prefetch_lanes(from + i);
    sums.add_lanes<Grad>(from + i);
    for (int64_t j = i; j < i + kSumLanes; j += 2 * Pack<S>::kLanes) {
      Unit<S> p, g, m;
      Grad::load(grad + j, g);
      ExpAvg::load(exp_avg + j, m);
      Param::load(param + j, p);
      for (int half = 0; half < 2; ++half) {
        adamw_first_moment(g[half], m[half], k);
        blockwise_adam_param(p[half], m[half], k.rate, k.decay);
      }
      ExpAvg::store(exp_avg + j, m);
      Param::store(param + j, p);
    }
  }
  *next = sums;
}

// n elements of kTogether rows, `stride` elements apart, whose columns' rates are given; n is a multiple of a unit.
template <typename Param, typename Grad, typename ExpAvg, typename S>
void update_together(void* const* data, int64_t stride, const S* rates, int64_t n,
                     const StepScalars<Pack<S>>& scalars) {
  const StepScalars<Pack<S>> k = scalars;  // copies that stay in registers
  auto* const param = static_cast<typename Param::Stored*>(data[Role::kParam]);
  const auto* const grad = static_cast<const typename Grad::Stored*>(data[Role::kGrad]);
  auto* const exp_avg = static_cast<typename ExpAvg::Stored*>(data[Role::kExpAvg]);
  for (int64_t column = 0; column < n; column += 2 * Pack<S>::kLanes) {
    Unit<S> rate;
    PackPlain<S>::load(rates + column, rate);
    for (int64_t i = column; i < column + kTogether * stride; i += stride) {
      __builtin_prefetch(param + i + kSquaresAhead, 0, 0);
      __builtin_prefetch(exp_avg + i + kSquaresAhead, 0, 0);
      __builtin_prefetch(grad + i + kSquaresAhead, 0, 0);
      Unit<S> p, g, m;
      Grad::load(grad + i, g);
      ExpAvg::load(exp_avg + i, m);
      Param::load(param + i, p);
      for (int half = 0; half < 2; ++half) {
        adamw_first_moment(g[half], m[half], k);
        blockwise_adam_param(p[half], m[half], rate[half], k.decay);
      }
      ExpAvg::store(exp_avg + i, m);
      Param::store(param + i, p);
    }
  }
}

// ---- from sums to rates, in place

// As many blocks as a pack has lanes.
FUSEDOPT_INLINE void rates_of_pack(float* block_sq, double* sums, Double weight, const AdamWScalars<Double>& k) {
  typedef float Half __attribute__((vector_size(kPackBytes / 2)));
  Double v = __builtin_convertvector(load_bytes<Half>(block_sq), Double::Raw);
  const Double rate = blockwise_adam_rate(v, Double(load_bytes<Double::Raw>(sums)), weight, k);
  const Half rounded = __builtin_convertvector(v.v, Half);
  memcpy(block_sq, &rounded, sizeof rounded);
  memcpy(sums, &rate.v, sizeof rate.v);
}

// n blocks of one size.
void rates_of_blocks(float* block_sq, double* sums, int64_t n, double size, const AdamWScalars<double>& scalars) {
  const AdamWScalars<Double> k = scalars.as<Double>();
  const Double weight(scalars.grad_weight / size);
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) rates_of_pack(block_sq + i, sums + i, weight, k);
  if (i == n) return;
  float v[kDoubles] = {};
  double sum[kDoubles] = {};
  memcpy(v, block_sq + i, (n - i) * sizeof *v);
  memcpy(sum, sums + i, (n - i) * sizeof *sum);
  rates_of_pack(v, sum, weight, k);
  memcpy(block_sq + i, v, (n - i) * sizeof *v);
  memcpy(sums + i, sum, (n - i) * sizeof *sum);
}

// Blocks [block, block + n) of a region; its last one may be smaller.
void rates_of_region(const BlockRegion& region, float* block_sq, double* sums, int64_t block, int64_t n,
                     const AdamWScalars<double>& scalars) {
  const int64_t end = block + n, last = end == region.blocks();
  rates_of_blocks(block_sq + block, sums, n - last, double(region.numel_of(0)), scalars);
  if (last) rates_of_blocks(block_sq + end - 1, sums + n - 1, 1, double(region.numel_of(end - 1)), scalars);
}

// ---- one region of one tensor

constexpr int64_t kSlack = kPackBytes / 2;  // room for a whole unit of floats behind the last element
static_assert(kShortRun <= kWidest && kTile % kSumLanes == 0);

// A tensor's row, with a layout also where it is flat: then one dimension of stride 1.
struct Tensor {
  const TensorRow& row;
  int64_t flat[2 + kMaxRoles];
  RowLayout layout;

  Tensor(const TensorTable& table, const TensorRow& r)
      : row(r), flat{1, r.numel, 1, 1, 1, 1, 1, 1}, layout(r.layout == kFlat ? flat : table.layouts + r.layout) {
    static_assert(kMaxRoles == 6);
  }
  char* at(int role, int64_t element) const {
    return static_cast<char*>(row.data[role]) + element * size_of(row.dtype[role]);
  }
};

template <typename S>  // float, or double for fp64 parameters
class Region {
 public:
  Region(const Tensor& tensor, const BlockRegion& region, const AdamWScalars<double>& scalars)
      : tensor_(tensor), region_(region), scalars_(scalars) {}

  void update_coordinates(int64_t begin, int64_t end) const {
    run(EachCoordinate{scalars_}, region_.offset + begin, end - begin, block_sq(begin));
  }

  // Blocks [block, end) of whole runs that need one pass, each updated while the next one is summed. False: elements
  // don't lie in a row, or there are no kernels for their dtypes.
  bool update_chain(int64_t block, int64_t end) const {
    if (region_.rows != 1 || region_.group < kOneRate || tensor_.row.layout != kFlat) return false;
    return with_row_codecs<S>(tensor_.row, [&](auto param, auto grad, auto exp_avg) {
      chain<decltype(param), decltype(grad), decltype(exp_avg)>(block, end);
    });
  }

  // The sum of squared gradients of each of the unit's blocks, as far as the unit has them.
  void sum(const BlockUnit& unit, double* sums, bool one_pass) const {
    if (region_.rows == 1 && region_.group >= kSumLanes)
      sum_runs(unit, sums, one_pass);
    else
      sum_columns(unit, sums);
  }

  void update_rates(const BlockUnit& unit, double* sums) const {
    rates_of_region(region_, block_sq(0), sums, unit.block, unit.blocks, scalars_);
  }

  // Updates moments and parameters; rates[i] is that of the unit's i-th block.
  void update(const BlockUnit& unit, const double* rates, bool one_pass) const {
    int64_t ahead[Role::kCount];
    set_ahead(unit, one_pass, ahead);
    if (region_.rows == 1 && region_.group >= kOneRate) return update_runs(unit, rates, ahead);
    alignas(64) S spread[kWidest + kSlack];
    spread_rates(unit, rates, spread);
    const OwnRates step{{scalars_, ahead, 0}};
    const int64_t together = unit.rows / kTogether * kTogether, whole = whole_units(unit.columns);
    const bool far = together > 0 && whole >= kLongRow && update_far(step, unit, spread);
    if (far && whole < unit.columns) update_rows(step, unit, unit.row, together, whole, spread);
    update_rows(step, unit, far ? unit.row + together : unit.row, far ? unit.rows - together : unit.rows, 0, spread);
  }

 private:
  float* block_sq(int64_t block) const {
    return static_cast<float*>(tensor_.row.data[Role::kBlockSq]) + region_.first_block + block;
  }
  int64_t element(int64_t row, int64_t column) const { return region_.offset + row * region_.stride + column; }

  template <typename Param, typename Grad, typename ExpAvg>
  void chain(int64_t block, int64_t end) const {
    constexpr int64_t kUnit = 2 * Pack<S>::kLanes;
    const int64_t ahead[] = {kPrefetchBytes, kPrefetchBytes, kPrefetchBytes};
    int64_t at = element(0, block * region_.group);
    LaneSums sums;
    sums.add<Grad>(grad_at<Grad>(at), region_.numel_of(block), kPrefetchBytes);
    for (; block < end; ++block) {
      double rate = sums.total();
      rates_of_blocks(block_sq(block), &rate, 1, double(region_.numel_of(block)), scalars_);
      const OneRate update{{scalars_, ahead, rate}};
      const int64_t n = region_.numel_of(block), following = block + 1 < end ? region_.numel_of(block + 1) : 0;
      int64_t both = (n < following ? n : following) / kSumLanes * kSumLanes;
      if (both < n && n - both < kUnit && both > 0) both -= kSumLanes;  // no unit for less
      sums = LaneSums();
      void* data[] = {tensor_.at(Role::kParam, at), tensor_.at(Role::kGrad, at), tensor_.at(Role::kExpAvg, at)};
      update_beside_sum<Param, Grad, ExpAvg, S>(data, grad_at<Grad>(at + n), both, update.template prepare<S>(), &sums);
      sums.add<Grad>(grad_at<Grad>(at + n + both), following - both, kPrefetchBytes);
      for (int role = 0; role < 3; ++role) data[role] = tensor_.at(role, at + both);
      if (n > both) UnitRunner<OneRate, Param, Grad, ExpAvg>::run(update, data, n - both);
      at += n;
    }
  }
  template <typename Grad>
  const typename Grad::Stored* grad_at(int64_t element) const {
    return reinterpret_cast<const typename Grad::Stored*>(tensor_.at(Role::kGrad, element));
  }

  // Memory must not idle while a block is summed or its gradient is read again: each of the two loops fetches a part of
  // what the next unit needs, the sums its parameters, the update its gradient and first moment.
  bool another_follows(const BlockUnit& unit) const {
    return region_.rows == 1 && unit.columns <= kRun && unit.column + 2 * unit.columns <= region_.columns;
  }
  void set_ahead(const BlockUnit& unit, bool one_pass, int64_t* ahead) const {
    const bool next = one_pass && another_follows(unit);
    for (int role = 0; role < Role::kBlockSq; ++role)
      ahead[role] = next ? unit.columns * size_of(tensor_.row.dtype[role]) : kPrefetchBytes;
    if (next) ahead[Role::kParam] = 0;
  }

  // Whole packs, which may reach into the next block's place, to be overwritten, or beyond the end.
  void spread_rates(const BlockUnit& unit, const double* rates, S* spread) const {
    for (int64_t block = 0, i = 0; block < unit.blocks; ++block) {
      const Pack<S> rate(S(rates[block]));
      const int64_t end = (unit.block + block + 1) * region_.group - unit.column;
      for (int64_t j = i; j < end && j < unit.columns; j += Pack<S>::kLanes) memcpy(spread + j, &rate.v, sizeof rate.v);
      i = end;
    }
  }

  static int64_t whole_units(int64_t columns) { return columns / (2 * Pack<S>::kLanes) * (2 * Pack<S>::kLanes); }

  // Rows of a strip from a column on, one after another.
  void update_rows(const OwnRates& step, const BlockUnit& unit, int64_t row, int64_t rows, int64_t column,
                   S* spread) const {
    for (const int64_t end = row + rows; row < end; ++row)
      run(step, element(row, unit.column + column), unit.columns - column, spread + column);
  }

  // The whole units of all rows that make up kTogether streams. False: elements don't lie in a row, or there are no
  // kernels for their dtypes.
  bool update_far(const OwnRates& step, const BlockUnit& unit, const S* spread) const {
    if (tensor_.row.layout != kFlat) return false;
    const int64_t quarter = unit.rows / kTogether;
    return with_row_codecs<S>(tensor_.row, [&](auto param, auto grad, auto exp_avg) {
      for (int64_t row = unit.row; row < unit.row + quarter; ++row) {
        const int64_t at = element(row, unit.column);
        void* data[] = {tensor_.at(Role::kParam, at), tensor_.at(Role::kGrad, at), tensor_.at(Role::kExpAvg, at)};
        update_together<decltype(param), decltype(grad), decltype(exp_avg), S>(
            data, quarter * region_.stride, spread, whole_units(unit.columns), step.template prepare<S>());
      }
    });
  }

  void update_runs(const BlockUnit& unit, const double* rates, const int64_t* ahead) const {
    for (int64_t block = 0, column = unit.column, end = column + unit.columns; block < unit.blocks; ++block) {
      const int64_t stop = (unit.block + block + 1) * region_.group, n = (stop < end ? stop : end) - column;
      run<OneRate, S>(OneRate{{scalars_, ahead, rates[block]}}, element(0, column), n, nullptr);
      column += n;
    }
  }

  // Runs an algorithm over n elements; `last` is its last role, of the arithmetic's type or fp32.
  template <typename Algorithm, typename Last>
  void run(const Algorithm& algorithm, int64_t at, int64_t n, Last* last) const {
    if (tensor_.row.layout == kFlat) {
      void* data[] = {tensor_.at(Role::kParam, at), tensor_.at(Role::kGrad, at), tensor_.at(Role::kExpAvg, at), last};
      if constexpr (std::is_same_v<Last, S>)
        if (with_row_codecs<S>(tensor_.row, [&](auto p, auto g, auto m) {
              run_as<Algorithm, decltype(p), decltype(g), decltype(m), PackPlain<S>>(algorithm, data, n);
            }))
          return;
    }
    for (int64_t i = 0; i < n; i += kTile)
      run_tile(algorithm, at + i, n - i < kTile ? n - i : kTile, last ? last + i : nullptr);
  }

  template <typename Algorithm, typename Last>
  void run_tile(const Algorithm& algorithm, int64_t at, int64_t n, Last* last) const {
    using Plain = PackPlain<S>;
    alignas(64) S tiles[Role::kCount][kTile];
    void* data[] = {tiles[0], tiles[1], tiles[2], tiles[3]};
    for (int role = 0; role < Role::kBlockSq; ++role) load_tile(tensor_.row, tensor_.layout, role, at, n, tiles[role]);
    for (int64_t i = 0; last && i < n; ++i) tiles[Role::kBlockSq][i] = S(last[i]);
    run_as<Algorithm, Plain, Plain, Plain, Plain>(algorithm, data, n);
    store_tile(tensor_.row, tensor_.layout, Role::kParam, at, n, tiles[Role::kParam]);
    store_tile(tensor_.row, tensor_.layout, Role::kExpAvg, at, n, tiles[Role::kExpAvg]);
    if (Algorithm::kWrites >> Role::kBlockSq & 1)
      for (int64_t i = 0; i < n; ++i) last[i] = Last(tiles[Role::kBlockSq][i]);
  }

  // Whether the gradient's elements lie in a row and have a codec for this arithmetic.
  bool grad_in_place() const {
    const bool wide = tensor_.row.dtype[Role::kGrad] == DType::kFloat64;
    return tensor_.row.layout == kFlat && wide == (sizeof(S) == sizeof(double));
  }

  // Calls f(codec, data, n, at) with n elements of the gradient: as they lie, or tile by tile from the at-th on.
  template <typename F>
  void visit_grad(int64_t at, int64_t n, F f) const {
    if (grad_in_place()) {
      const void* data = tensor_.at(Role::kGrad, at);
      if constexpr (sizeof(S) == sizeof(double)) return f(PackPlain<double>(), static_cast<const double*>(data), n, 0);
      switch (tensor_.row.dtype[Role::kGrad]) {
        case DType::kFloat32: return f(PackPlain<float>(), static_cast<const float*>(data), n, 0);
        case DType::kBFloat16: return f(PackBFloat16<LaneOrder::kLinear>(), static_cast<const uint16_t*>(data), n, 0);
        default: return f(PackFloat16(), static_cast<const uint16_t*>(data), n, 0);
      }
    }
    alignas(64) S tile[kTile];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t part = n - i < kTile ? n - i : kTile;
      load_tile(tensor_.row, tensor_.layout, Role::kGrad, at + i, part, tile);
      f(PackPlain<S>(), static_cast<const S*>(tile), part, i);
    }
  }

  void sum_runs(const BlockUnit& unit, double* sums, bool one_pass) const {
    int64_t ahead = kPrefetchBytes;
    if (one_pass && another_follows(unit))
      ahead = tensor_.at(Role::kParam, region_.offset + unit.column + unit.columns) -
              tensor_.at(Role::kGrad, region_.offset + unit.column);
    for (int64_t block = 0, column = unit.column; block < unit.blocks; ++block) {
      const int64_t left = unit.column + unit.columns - column, n = left < region_.group ? left : region_.group;
      LaneSums lanes;
      visit_grad(element(0, column), n, [&](auto codec, const auto* from, int64_t part, int64_t) {
        lanes.add<decltype(codec)>(from, part, ahead);
      });
      sums[block] = lanes.total();
      column += n;
    }
  }

  // Squares of a row, or of kRows of them that are `stride` elements apart, to the sums of the columns.
  template <int kRows>
  void add_rows(const BlockUnit& unit, int64_t row, int64_t stride, double* columns) const {
    visit_grad(element(row, unit.column), unit.columns, [&](auto codec, const auto* from, int64_t n, int64_t at) {
      add_squares<decltype(codec), kRows>(columns + at, from, stride, n);
    });
  }

  void sum_columns(const BlockUnit& unit, double* sums) const {
    alignas(64) double columns[kWidest + kSlack];
    for (int64_t i = 0; i < unit.columns + kSlack; ++i) columns[i] = 0;
    const int64_t quarter = unit.rows / kTogether, end = unit.row + unit.rows;
    for (int64_t row = unit.row; row < unit.row + quarter; ++row) {
      if (grad_in_place())
        add_rows<kTogether>(unit, row, quarter * region_.stride, columns);
      else
        for (int64_t k = 0; k < kTogether; ++k) add_rows<1>(unit, row + k * quarter, 0, columns);
    }
    for (int64_t row = unit.row + kTogether * quarter; row < end; ++row) add_rows<1>(unit, row, 0, columns);
    const int64_t group = region_.group, whole = unit.columns / group;
    int64_t block = 0;
    for (; block + 4 <= whole; block += 4) four_sums_of(columns + block * group, group, sums + block);
    for (; block < whole; ++block) sums[block] = sum_of(columns + block * group, group);
    if (block < unit.blocks) sums[block] = sum_of(columns + block * group, unit.columns - block * group);
  }

  const Tensor& tensor_;
  const BlockRegion& region_;
  const AdamWScalars<double>& scalars_;
};

// ---- walks

// A row's first lines, while the row before it is at work: among thousands of small tensors every start is a miss.
void prefetch_start(const TensorRow& row) {
  for (int role = 0; role < Role::kBlockSq; ++role)
    for (int64_t at = 0; at < 512 && at < row.numel * size_of(row.dtype[role]); at += 64)
      __builtin_prefetch(static_cast<const char*>(row.data[role]) + at);
}

// Calls f(row, region's index, split, first unit, end) for all units that begin in a range of elements.
template <typename F>
void for_each_range(const TensorTable& table, int64_t begin, int64_t end, F f) {
  for (int64_t r = row_at(table, begin); r < table.size && table.starts[r] < end; ++r) {
    if (r + 1 < table.size) prefetch_start(table.rows[r + 1]);
    int64_t start = table.starts[r];
    for (int64_t i = table.blocks[r].begin; i < table.blocks[r].end; ++i) {
      const BlockRegion& region = table.regions[i];
      if (start < end && start + region.numel() > begin) {
        const BlockSplit split(region);
        const int64_t first = split.unit_at(begin - start), last = split.unit_at(end - start);
        if (first < last) f(table.rows[r], i, split, first, last);
      }
      start += region.numel();
    }
  }
}

// Calls f(row, region, values) for all regions that need two passes.
template <typename F>
void for_each_two_pass_region(const TensorTable& table, const BlockSums& sums, int64_t first_row, int64_t last_row,
                              F f) {
  for (int64_t r = first_row; r < last_row; ++r)
    for (int64_t i = table.blocks[r].begin; i < table.blocks[r].end; ++i)
      if (sums.places[i] != kOnePass) f(table.rows[r], table.regions[i], sums.values + sums.places[i]);
}

template <typename F>  // calls f(S) with the number type of a row's arithmetic
void with_arithmetic(const TensorRow& row, F f) {
  if (row.dtype[Role::kParam] == DType::kFloat64)
    f(double());
  else
    f(float());
}

template <typename S>
void update_units(const Region<S>& region, const BlockSplit& split, int64_t first, int64_t last, const double* rates) {
  if (split.coordinates()) return region.update_coordinates(first, last);
  if (split.one_pass()) {
    const BlockUnit front = split.unit(first), back = split.unit(last - 1);
    if (region.update_chain(front.block, back.block + back.blocks)) return;
  }
  for (int64_t u = first; u < last; ++u) {
    const BlockUnit unit = split.unit(u);
    if (!split.one_pass()) {
      region.update(unit, rates + unit.block, false);
      continue;
    }
    double own[kMostBlocks];
    region.sum(unit, own, true);
    region.update_rates(unit, own);
    region.update(unit, own, true);
  }
}

}  // namespace

// First pass: the sums of all units of regions that need two.
void blockwise_adam_sums(const TensorTable& table, const BlockSums& sums, int64_t begin, int64_t end) {
  const AdamWScalars<double> unused = {};
  for_each_range(table, begin, end,
                 [&](const TensorRow& row, int64_t i, const BlockSplit& split, int64_t u, int64_t last) {
                   if (split.one_pass()) return;
                   const Tensor tensor(table, row);
                   double* values = sums.values + sums.places[i] + table.regions[i].blocks();
                   with_arithmetic(row, [&](auto s) {
                     const Region<decltype(s)> region(tensor, table.regions[i], unused);
                     for (; u < last; ++u) region.sum(split.unit(u), values + u * split.blocks_per_unit(), false);
                   });
                 });
}

// Between the passes: from the sums to the rates of their blocks, on one thread.
void blockwise_adam_rates(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                          int64_t first_row, int64_t last_row) {
  for_each_two_pass_region(table, sums, first_row, last_row,
                           [&](const TensorRow&, const BlockRegion& region, double* totals) {
                             const BlockSplit split(region);
                             const double* parts = totals + region.blocks();
                             for (int64_t b = 0; b < region.blocks(); ++b) totals[b] = 0;
                             for (int64_t u = 0; u < split.units(); ++u) {
                               const BlockUnit unit = split.unit(u);
                               for (int64_t b = 0; b < unit.blocks; ++b)
                                 totals[unit.block + b] += parts[u * split.blocks_per_unit() + b];
                             }
                             if (region.shared == kOwnBlocks) return;
                             sums.shared[region.shared].sum += totals[0];
                             sums.shared[region.shared].count += double(region.numel());
                           });
  for_each_two_pass_region(table, sums, first_row, last_row,
                           [&](const TensorRow& row, const BlockRegion& region, double* totals) {
                             float* block_sq = static_cast<float*>(row.data[Role::kBlockSq]) + region.first_block;
                             const AdamWScalars<double>& k = scalars[row.scalars];
                             if (region.shared == kOwnBlocks)
                               return rates_of_region(region, block_sq, totals, 0, region.blocks(), k);
                             totals[0] = sums.shared[region.shared].sum;
                             rates_of_blocks(block_sq, totals, 1, sums.shared[region.shared].count, k);
                           });
}

// Second pass, and the only one for regions that need no other.
void blockwise_adam_update(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                           int64_t begin, int64_t end) {
  for_each_range(table, begin, end,
                 [&](const TensorRow& row, int64_t i, const BlockSplit& split, int64_t u, int64_t last) {
                   const Tensor tensor(table, row);
                   with_arithmetic(row, [&](auto s) {
                     const Region<decltype(s)> region(tensor, table.regions[i], scalars[row.scalars]);
                     update_units(region, split, u, last, split.one_pass() ? nullptr : sums.values + sums.places[i]);
                   });
                 });
}

}  // namespace fusedopt::FUSEDOPT_TARGET
