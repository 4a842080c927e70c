// The element-wise driver: runs a formula over a range of a tensor table's elements.
//
// An algorithm is a class with
//   kRoles, kWrites, kOptional         how many roles; which are written, which may be absent (bit r is role r)
//   prepare<S>()                       the row's scalars, each in a pack of S
//   begin(x..., complete, scalars)     the update in three stages, of about the same latency. The first has one pack of
//   middle(begun, scalars)             every role but the parameter (role 0); complete: optional roles are there. What
//   finish(param, middle, scalars)     a stage returns goes to the next, the parameter to the last.
//   Begun<S>, Middle<S>                what begin and middle return
//   kPipelined                         whether the stages have latencies that are worth overlapping; if not,
//                                      scalars.ahead[role] says how many bytes ahead to ask for memory
//   run(data, n, next)                 UnitRunner with the codecs of the row's dtypes; false if there is none for them
//   run_plain(S* const* data, n, next) the same where every role is stored as plain S
// A flat row whose dtypes have a kernel is handed over as it lies. Any other row (strides that differ between roles,
// gaps, unusual mixes of dtypes) passes through tiles that fit the L1 cache, in the arithmetic's own number type: the
// same formula on the same values, so the same bits.
#pragma once
#include <tuple>
#include <utility>

#include "common/tensor_table.h"
#include "cpu/pack_storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int64_t kTile = 512;

// Hardware prefetchers lose streams that run at equal offsets in their pages, as separately allocated tensors do: on
// Zen 3 that cost a quarter of a bf16 step. Asking for each stream this far ahead brings it back.
constexpr int64_t kPrefetchElements = 128;

// Where the next row's elements lie, to be asked for while this row's last ones are at work: among thousands of small
// tensors every start would be a miss.
struct NextRow {
  const void* data[kMaxRoles];
};

// Calls f(codec) for the codec that a dtype is stored in.
template <typename F>
inline void with_codec(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(Float32());
    case DType::kFloat64: return f(Float64());
    case DType::kBFloat16: return f(BFloat16());
    default: return f(Float16());
  }
}

// The mixes of dtypes that have kernels: calls f with the codecs of parameter, gradient and states; kOrder is the
// lanes' where all are bf16. False: it is none of them.
template <LaneOrder kOrder, typename F>
inline bool with_codecs(DType param, DType grad, DType state, F f) {
  using F32 = PackPlain<float>;
  using F64 = PackPlain<double>;
  using BF16 = PackBFloat16<LaneOrder::kLinear>;
  using F16 = PackFloat16;
  constexpr auto key = [](DType p, DType g, DType s) { return int(p) << 16 | int(g) << 8 | int(s); };
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  switch (key(param, grad, state)) {
    case key(f32, f32, f32): f(F32(), F32(), F32()); return true;
    case key(f32, f32, bf16): f(F32(), F32(), BF16()); return true;
    case key(f32, bf16, f32): f(F32(), BF16(), F32()); return true;
    case key(bf16, bf16, f32): f(BF16(), BF16(), F32()); return true;
    case key(bf16, f32, f32): f(BF16(), F32(), F32()); return true;
    case key(bf16, bf16, bf16): {
      using Alike = PackBFloat16<kOrder>;
      f(Alike(), Alike(), Alike());
      return true;
    }
    case key(f16, f16, f32): f(F16(), F16(), F32()); return true;
    case key(f16, f16, f16): f(F16(), F16(), F16()); return true;
    case key(f64, f64, f64): f(F64(), F64(), F64()); return true;
    default: return false;
  }
}

// Walks elements [begin, begin + n) of one role in the row's order, as runs along the last dimension:
// f(offset of the run's first element, stride, length).
template <typename F>
inline void for_each_run(const RowLayout& layout, int role, int64_t begin, int64_t n, F f) {
  const int64_t* strides = layout.strides_of(role);
  const int64_t last = layout.ndim - 1, length = layout.sizes[last];
  for (int64_t i = begin; i < begin + n;) {
    int64_t rest = i / length, offset = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      offset += rest % layout.sizes[d] * strides[d];
      rest /= layout.sizes[d];
    }
    const int64_t at = i % length, run = length - at < begin + n - i ? length - at : begin + n - i;
    f(offset + at * strides[last], strides[last], run);
    i += run;
  }
}

template <typename S>
inline void load_tile(const TensorRow& row, const RowLayout& layout, int role, int64_t begin, int64_t n, S* tile) {
  with_codec(row.dtype[role], [&](auto codec) {
    using Codec = decltype(codec);
    const auto* data = static_cast<const typename Codec::Stored*>(row.data[role]);
    for_each_run(layout, role, begin, n, [&](int64_t offset, int64_t stride, int64_t length) {
      for (int64_t i = 0; i < length; ++i) *tile++ = S(Codec::decode(data[offset + i * stride]));
    });
  });
}

template <typename S>
inline void store_tile(const TensorRow& row, const RowLayout& layout, int role, int64_t begin, int64_t n,
                       const S* tile) {
  with_codec(row.dtype[role], [&](auto codec) {
    using Codec = decltype(codec);
    auto* data = static_cast<typename Codec::Stored*>(row.data[role]);
    for_each_run(layout, role, begin, n, [&](int64_t offset, int64_t stride, int64_t length) {
      for (int64_t i = 0; i < length; ++i) data[offset + i * stride] = Codec::encode(*tile++);
    });
  });
}

// Runs an algorithm over n elements that lie one after another in every role, stored as Codecs say.
template <typename Algorithm, typename... Codecs>
class UnitRunner {
 public:
  using S = typename std::tuple_element_t<0, std::tuple<Codecs...>>::Value;
  static constexpr int64_t kUnit = 2 * Pack<S>::kLanes;

  // Whole units, and one that ends with the last element: computed first, while its inputs are untouched, and stored
  // last, so that what it shares with the unit before gets the same bits twice.
  static void run(const Algorithm& algorithm, void* const* data, int64_t n, const NextRow& next) {
    const auto scalars = algorithm.template prepare<S>();
    bool complete = true;
    for (int role = 0; role < kRoles; ++role) complete &= data[role] != nullptr;
    complete ? run_roles<true>(scalars, data, n, next) : run_roles<false>(scalars, data, n, next);
  }
  // The same, with more elements right behind these.
  static void run(const Algorithm& algorithm, void* const* data, int64_t n) {
    const Prefetch behind = prefetch_from(data, n);
    NextRow next = {};
    for (int role = 0; role < kRoles; ++role) next.data[role] = reinterpret_cast<const void*>(behind.from[role]);
    run(algorithm, data, n, next);
  }

 private:
  static constexpr int kRoles = Algorithm::kRoles;
  template <size_t R>
  using Codec = std::tuple_element_t<R, std::tuple<Codecs...>>;
  template <size_t R>
  using Stored = typename Codec<R>::Stored;
  using Param = Codec<0>;

  template <size_t... R>
  using Sequence = std::index_sequence<R...>;
  template <size_t... R>
  static Sequence<(R + 1)...> after(Sequence<R...>);
  using Indices = std::make_index_sequence<kRoles>;
  using AllButParam = decltype(after(std::make_index_sequence<kRoles - 1>()));

  struct Roles {
    void* data[kRoles];
  };
  using Begun = typename Algorithm::template Begun<S>[2];  // of a unit's two packs
  using Middle = typename Algorithm::template Middle<S>[2];
  struct Prefetch {
    uintptr_t from[kRoles];
  };

  template <bool kComplete, typename Scalars>
  static void run_roles(const Scalars& scalars, void* const* data, int64_t n, const NextRow& next) {
    if (n < kUnit) return run_padded<kComplete>(scalars, data, n);
    const Scalars k = scalars;  // copies that no store through the pointers can reach, so they stay in registers
    Roles roles;
    for (int role = 0; role < kRoles; ++role) roles.data[role] = data[role];
    Unit<S> last[kRoles];
    if (n % kUnit) compute<kComplete>(k, roles, n - kUnit, last);
    const int64_t end = n - n % kUnit;
    if constexpr (Algorithm::kPipelined)
      run_pipelined<kComplete>(k, roles, n, end, next);
    else
      run_plainly<kComplete>(k, roles, end);
    if (n % kUnit) store<kComplete>(roles, n - kUnit, last, Indices());
  }

  template <bool kComplete, typename Scalars>
  static FUSEDOPT_INLINE void run_plainly(const Scalars& k, const Roles& roles, int64_t end) {
    Prefetch ahead;
    for (int role = 0; role < kRoles; ++role)
      ahead.from[role] = reinterpret_cast<uintptr_t>(roles.data[role]) + k.ahead[role];
    for (int64_t i = 0; i < end; i += kUnit) {
      prefetch_all<kComplete>(ahead, i, Indices());
      Begun begun;
      Middle middle;
      begin_and_store<kComplete>(k, roles, i, begun);
      proceed(k, begun, middle);
      finish_and_store(k, roles, i, middle);
    }
  }

  // Three units under way, a stage apart. In program order each would wait out its root and its division alone, since a
  // core looks only some 250 instructions ahead.
  template <bool kComplete, typename Scalars>
  static FUSEDOPT_INLINE void run_pipelined(const Scalars& k, const Roles& roles, int64_t n, int64_t end,
                                            const NextRow& next) {
    Begun begun;
    Middle middle;
    begin_and_store<kComplete>(k, roles, 0, begun);
    if (end > kUnit) {
      proceed(k, begun, middle);
      begin_and_store<kComplete>(k, roles, kUnit, begun);
      int64_t i = 2 * kUnit;
      const auto run_to = [&](int64_t stop, const Prefetch ahead) {
        for (; i < stop; i += kUnit) {
          prefetch_all<kComplete>(ahead, i, Indices());
          finish_and_store(k, roles, i - 2 * kUnit, middle);
          proceed(k, begun, middle);
          begin_and_store<kComplete>(k, roles, i, begun);
        }
      };
      Prefetch ahead = prefetch_from(roles.data, kPrefetchElements);
      for (int64_t stop = end - kPrefetchElements;; stop = end) {
        run_to(stop, ahead);
        if (stop == end) break;
        ahead = prefetch_from(next.data, n > kPrefetchElements ? kPrefetchElements - n : 0);
      }
      finish_and_store(k, roles, end - 2 * kUnit, middle);
    }
    proceed(k, begun, middle);
    finish_and_store(k, roles, end - kUnit, middle);
  }

  template <typename Pointer>
  static Prefetch prefetch_from(Pointer* const* data, int64_t offset) {
    static constexpr int64_t kSizes[] = {sizeof(typename Codecs::Stored)...};
    Prefetch prefetch;
    for (int role = 0; role < kRoles; ++role)
      prefetch.from[role] = reinterpret_cast<uintptr_t>(data[role]) + offset * kSizes[role];
    return prefetch;
  }

  // Of memory that may not be there: then it does nothing.
  template <bool kComplete, size_t... R>
  static FUSEDOPT_INLINE void prefetch_all(const Prefetch& prefetch, int64_t i, Sequence<R...>) {
    ((has<kComplete>(R)
          ? __builtin_prefetch(reinterpret_cast<const void*>(prefetch.from[R] + i * sizeof(Stored<R>)), 0, 0)
          : void()),
     ...);
  }

  template <bool kComplete>
  static constexpr bool has(size_t role) {
    return kComplete || !(Algorithm::kOptional >> role & 1);
  }

  template <bool kComplete, typename Scalars>
  static FUSEDOPT_INLINE void begin_and_store(const Scalars& k, const Roles& roles, int64_t i, Begun& begun) {
    Unit<S> x[kRoles];
    begin<kComplete>(k, roles, i, x, begun, AllButParam());
    store<kComplete>(roles, i, x, AllButParam());
  }

  template <typename Scalars>
  static FUSEDOPT_INLINE void proceed(const Scalars& k, const Begun& begun, Middle& middle) {
    for (int half = 0; half < 2; ++half) middle[half] = Algorithm::middle(begun[half], k);
  }

  template <typename Scalars>
  static FUSEDOPT_INLINE void finish_and_store(const Scalars& k, const Roles& roles, int64_t i, const Middle& middle) {
    Unit<S> param;
    finish(k, roles, i, middle, param);
    Param::store(static_cast<typename Param::Stored*>(roles.data[0]) + i, param);
  }

  // The whole update of a unit, without storing it.
  template <bool kComplete, typename Scalars>
  static FUSEDOPT_INLINE void compute(const Scalars& k, const Roles& roles, int64_t i, Unit<S> (&x)[kRoles]) {
    Begun begun;
    Middle middle;
    begin<kComplete>(k, roles, i, x, begun, AllButParam());
    proceed(k, begun, middle);
    finish(k, roles, i, middle, x[0]);
  }

  template <bool kComplete, typename Scalars, size_t... R>
  static FUSEDOPT_INLINE void begin(const Scalars& k, const Roles& roles, int64_t i, Unit<S> (&x)[kRoles], Begun& begun,
                                    Sequence<R...>) {
    ((has<kComplete>(R) ? Codec<R>::load(static_cast<const Stored<R>*>(roles.data[R]) + i, x[R]) : void()), ...);
    for (int half = 0; half < 2; ++half) begun[half] = Algorithm::begin(x[R][half]..., kComplete, k);
  }

  template <typename Scalars>
  static FUSEDOPT_INLINE void finish(const Scalars& k, const Roles& roles, int64_t i, const Middle& middle,
                                     Unit<S>& param) {
    Param::load(static_cast<const typename Param::Stored*>(roles.data[0]) + i, param);
    for (int half = 0; half < 2; ++half) Algorithm::finish(param[half], middle[half], k);
  }

  template <bool kComplete, size_t... R>
  static FUSEDOPT_INLINE void store(const Roles& roles, int64_t i, const Unit<S> (&x)[kRoles], Sequence<R...>) {
    ((Algorithm::kWrites >> R & 1 && has<kComplete>(R)
          ? Codec<R>::store(static_cast<Stored<R>*>(roles.data[R]) + i, x[R])
          : void()),
     ...);
  }

  // Fewer elements than a unit: on a copy with zeros behind them.
  template <bool kComplete, typename Scalars>
  static void run_padded(const Scalars& scalars, void* const* data, int64_t n) {
    static constexpr int64_t kSizes[] = {sizeof(typename Codecs::Stored)...};
    alignas(64) char padded[kRoles][kUnit * sizeof(S)] = {};
    Roles copies = {};
    for (int role = 0; role < kRoles; ++role)
      if (data[role]) copies.data[role] = memcpy(padded[role], data[role], n * kSizes[role]);
    Unit<S> x[kRoles];
    compute<kComplete>(scalars, copies, 0, x);
    store<kComplete>(copies, 0, x, Indices());
    for (int role = 0; role < kRoles; ++role)
      if (data[role] && (Algorithm::kWrites >> role & 1)) memcpy(data[role], padded[role], n * kSizes[role]);
  }
};

template <typename S, typename Algorithm>
inline void run_through_tiles(const Algorithm& algorithm, const TensorRow& row, const RowLayout& layout, int64_t begin,
                              int64_t end) {
  alignas(64) S tiles[kMaxRoles][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    S* data[kMaxRoles] = {};
    NextRow next = {};
    for (int role = 0; role < Algorithm::kRoles; ++role) {
      if (!row.data[role]) continue;
      next.data[role] = data[role] = tiles[role];
      load_tile(row, layout, role, at, n, tiles[role]);
    }
    algorithm.run_plain(data, n, next);
    for (int role = 0; role < Algorithm::kRoles; ++role)
      if (row.data[role] && (Algorithm::kWrites >> role & 1)) store_tile(row, layout, role, at, n, tiles[role]);
  }
}

template <typename Algorithm>
inline void run_row(const Algorithm& algorithm, const TensorTable& table, const TensorRow& row, int64_t begin,
                    int64_t end, const NextRow& next) {
  if (row.layout == kFlat) {
    void* data[kMaxRoles] = {};
    for (int role = 0; role < Algorithm::kRoles; ++role)
      if (row.data[role]) data[role] = static_cast<char*>(row.data[role]) + begin * size_of(row.dtype[role]);
    if (algorithm.run(data, end - begin, next)) return;
  }
  // A flat row in strides: one dimension of numel elements, stride 1 in every role.
  int64_t flat[2 + kMaxRoles] = {1, row.numel};
  for (int role = 0; role < kMaxRoles; ++role) flat[2 + role] = 1;
  const RowLayout layout(row.layout == kFlat ? flat : table.layouts + row.layout);
  if (row.dtype[0] == DType::kFloat64)
    run_through_tiles<double>(algorithm, row, layout, begin, end);
  else
    run_through_tiles<float>(algorithm, row, layout, begin, end);
}

// The last row that starts at or before an element.
inline int64_t row_at(const TensorTable& table, int64_t element) {
  int64_t low = 0, high = table.size;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (table.starts[middle] <= element ? low : high) = middle;
  }
  return low;
}

// make(row) builds the algorithm for a row.
template <typename Make>
inline void run_elements(const TensorTable& table, int64_t begin, int64_t end, Make make) {
  for (int64_t r = row_at(table, begin); r < table.size && table.starts[r] < end; ++r) {
    const TensorRow& row = table.rows[r];
    const int64_t from = begin > table.starts[r] ? begin - table.starts[r] : 0;
    const int64_t to = end < table.starts[r + 1] ? end - table.starts[r] : row.numel;
    const TensorRow& following = table.rows[r + 1 < table.size ? r + 1 : r];
    NextRow next = {};
    for (int role = 0; role < table.roles; ++role) next.data[role] = following.data[role];
    run_row(make(row), table, row, from, to, next);
  }
}

}  // namespace fusedopt::FUSEDOPT_TARGET
