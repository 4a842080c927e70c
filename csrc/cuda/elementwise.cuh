// The element-wise driver: runs a formula over a tensor table's elements in as few launches as the table allows.
//
// An algorithm is a class with
//   kRoles, kWrites, kOptional         how many roles; which are written, which may be absent (bit r is role r)
//   Scalars<S>, Record<S>              a row's scalars as the formula takes them, and what travels of them once for
//                                      neighbours that share it: a trivially copyable struct with bytes(), how many of
//                                      its bytes to send
//   record<S>(row), shares(row, row)   host: the row's record, and whether it is its neighbour's too
//   own_bytes<S>(), write_own<S>(row, to)   host: what travels with each row besides; a multiple of 2, the same for all
//   prepare(words, own, scalars)       device: the scalars from the words of the record and the row's own bytes; false:
//                                      leave the row alone
//   update(x..., complete, scalars)    device: one element per role; complete: optional roles are there
//
// Rows travel by value, as a kernel parameter: stateless, and right in a CUDA graph. A row takes 6 bytes for each role
// and 8 for its place, so that a launch has at least 700 of up to 5 roles and 8 bytes of their own, as long as no more
// than 8 records are sent and no strides. A thread block finds its chunk of a row by binary search over the rows' first
// chunks. Rows that lie flat in one of the algorithm's Formats take elementwise_kernel: 16-byte accesses in every role
// that is aligned where most roles are, single elements in the others and at the ends. Every other row (strides,
// unusual mixes of dtypes) takes any_elementwise_kernel, one element at a time. Both run the same formula on the same
// values, so they give the same bits.
#pragma once
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/tensor_table.h"
#include "cuda/launch.cuh"
#include "math/storage.h"

namespace fusedopt::FUSEDOPT_TARGET {

constexpr int kThreads = 128;
constexpr int kChunk = 4096;  // elements of one thread block; a row's first chunk has its head besides
constexpr int kMaxHead = 8;   // 16 bytes of the narrowest dtype
constexpr int kVectorBytes = 16;

constexpr int kAddressUnits = 3;  // of 16 bits: no device has longer addresses
constexpr int kPlaceUnits = 4;

// Rows fill the table from the front: addresses, what is the row's own, then a Place. Kinds fill it from the back: what
// neighbouring rows have in common (KindHead, the algorithm's record), and a layout where the row has one.
struct RowTable {
  static constexpr int kWords = 4093;
  int32_t size;
  int32_t roles;
  uint32_t thread_blocks;
  int32_t row_units;
  union {
    uint64_t words[kWords];
    uint16_t units[4 * kWords];
  };

  HOST_DEVICE uint64_t bits(int at, int count) const {
    uint64_t value = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) value |= uint64_t(units[at + i]) << 16 * i;
    return value;
  }
  HOST_DEVICE int place_at(int index) const { return (index + 1) * row_units - kPlaceUnits; }
  HOST_DEVICE uint32_t first_thread_block(int index) const { return uint32_t(bits(place_at(index), 2)); }
};
static_assert(sizeof(RowTable) <= kMaxKernelParameterBytes && RowTable::kWords < 4096 && kChunk <= 4096);

struct Place {  // where a row stands in the grid
  uint32_t first_thread_block;
  uint32_t kind;  // index into words
  uint32_t last;  // elements of the last chunk, from 1
  uint32_t head;  // elements before the first chunk

  HOST_DEVICE uint64_t pack() const {
    return first_thread_block | uint64_t(kind) << 32 | uint64_t(last - 1) << 44 | uint64_t(head) << 56;
  }
  HOST_DEVICE static Place unpack(uint64_t word) {
    return {uint32_t(word), uint32_t(word >> 32) & 0xfff, (uint32_t(word >> 44) & 0xfff) + 1, uint32_t(word >> 56)};
  }
};

struct KindHead {
  DType dtype[kMaxRoles];
  uint8_t record_words;
  uint8_t ndim;  // 0: flat; else sizes[ndim] and strides[ndim] of each role follow the record
};
static_assert(sizeof(KindHead) == sizeof(uint64_t));

// ---- host: packing

// Packs rows of any sort, and kinds.
class TablePacker {
 public:
  // Rows of one word for each of `roles`.
  explicit TablePacker(int roles) : TablePacker(roles, 4 * roles) {}

  void clear() {
    rows_.size = 0;
    rows_.thread_blocks = 0;
    free_ = RowTable::kWords;
  }

  const RowTable& rows() const { return rows_; }

 protected:
  TablePacker(int roles, int units) {
    rows_.roles = roles;
    rows_.row_units = units + kPlaceUnits;
    clear();
  }

  // Whether a row fits beside those already here; kind_words: 0 if it has the kind of the row before it.
  bool fits(int64_t thread_blocks, int64_t kind_words) const {
    return (rows_.size + 1) * int64_t(rows_.row_units) <= 4 * (free_ - kind_words) &&
           thread_blocks <= INT32_MAX - int64_t(rows_.thread_blocks);
  }
  uint64_t* add_kind(int64_t kind_words) { return rows_.words + (free_ -= kind_words); }
  // Where the row's units are to be written.
  uint16_t* add_row(int64_t thread_blocks, int64_t last, int head) {
    const uint64_t place = Place{rows_.thread_blocks, uint32_t(free_), uint32_t(last), uint32_t(head)}.pack();
    write_units(rows_.units + rows_.place_at(rows_.size), place, kPlaceUnits);
    rows_.thread_blocks += uint32_t(thread_blocks);
    return rows_.units + rows_.size++ * rows_.row_units;
  }
  void add_row(const uint64_t* row, int64_t thread_blocks, int64_t last, int head) {
    memcpy(add_row(thread_blocks, last, head), row, rows_.roles * sizeof *row);
  }
  static void write_units(uint16_t* to, uint64_t value, int count) {
    for (int i = 0; i < count; ++i) to[i] = uint16_t(value >> 16 * i);
  }

 private:
  RowTable rows_;
  int64_t free_;  // where kinds begin
};

class RowPacker : public TablePacker {
 public:
  RowPacker(int roles, int own_bytes) : TablePacker(roles, kAddressUnits * roles + own_bytes / 2) {}

  // False, and nothing changed, if the row does not fit beside those already here.
  template <typename S, typename Algorithm>
  bool add(const TensorTable& table, const TensorRow& row, int head, const Algorithm& algorithm) {
    const int roles = rows().roles;
    const int64_t* layout = row.layout == kFlat ? nullptr : table.layouts + row.layout;
    const int64_t chunks = (row.numel - head + kChunk - 1) / kChunk;
    const bool shares = rows().size > 0 && same_layout(table, row, *last_) &&
                        memcmp(row.dtype, last_->dtype, sizeof row.dtype) == 0 && algorithm.shares(*last_, row);
    const auto record = algorithm.template record<S>(row);
    const int64_t ndim = layout ? layout[0] : 0, record_words = (record.bytes() + 7) / 8;
    const int64_t kind_words = shares ? 0 : 1 + record_words + ndim * (1 + roles);
    if (ndim > 255 || !fits(chunks, kind_words)) return false;
    if (!shares) write_kind(row, layout, record, record_words, add_kind(kind_words));
    uint16_t* units = add_row(chunks, row.numel - head - (chunks - 1) * kChunk, head);
    for (int role = 0; role < roles; ++role, units += kAddressUnits)
      write_units(units, reinterpret_cast<uintptr_t>(row.data[role]), kAddressUnits);
    algorithm.template write_own<S>(row, units);
    last_ = &row;
    return true;
  }

 private:
  static bool same_layout(const TensorTable& table, const TensorRow& a, const TensorRow& b) {
    if (a.layout == b.layout) return true;
    if (a.layout == kFlat || b.layout == kFlat) return false;
    const int64_t *own = table.layouts + a.layout, *other = table.layouts + b.layout;
    return *own == *other && memcmp(own, other, (1 + *own * (1 + table.roles)) * sizeof *own) == 0;
  }

  template <typename Record>
  void write_kind(const TensorRow& row, const int64_t* layout, const Record& record, int64_t record_words,
                  uint64_t* words) {
    static_assert(std::is_trivially_copyable_v<Record>);
    KindHead head = {};
    memcpy(head.dtype, row.dtype, sizeof head.dtype);
    head.record_words = uint8_t(record_words);
    head.ndim = uint8_t(layout ? layout[0] : 0);
    memcpy(words, &head, sizeof head);
    memcpy(words + 1, &record, record.bytes());
    const int64_t layout_words = head.ndim * int64_t(1 + rows().roles);
    if (layout) memcpy(words + 1 + record_words, layout + 1, layout_words * sizeof(int64_t));
  }

  const TensorRow* last_ = nullptr;
};

inline uintptr_t address_of(const TensorRow& row, int role) { return reinterpret_cast<uintptr_t>(row.data[role]); }

// How many elements to leave to single accesses so that as many roles as possible are aligned behind them.
inline int head_of(const TensorRow& row, int roles) {
  uintptr_t all = 0;
  for (int role = 0; role < roles; ++role) all |= address_of(row, role);
  if (all % kVectorBytes == 0) return 0;
  int best = 0, most = -1;
  for (int head = 0; head < kMaxHead && head < row.numel; ++head) {
    int aligned = 0;
    for (int role = 0; role < roles; ++role)
      aligned += row.data[role] && (address_of(row, role) + head * size_of(row.dtype[role])) % kVectorBytes == 0;
    if (aligned > most) best = head, most = aligned;
  }
  return best;
}

// A GPU has no access to an element across its own boundary, and rows hold addresses of 48 bits.
inline Status check_alignment(const TensorTable& table) {
  for (const TensorRow* row = table.rows; row < table.rows + table.size; ++row)
    for (int role = 0; role < table.roles; ++role) {
      const uintptr_t address = address_of(*row, role);
      if (address && address % size_of(row->dtype[role]))
        return {"an array's address is not a multiple of its elements' size"};
      if (address >> 16 * kAddressUnits) return {"an array's address has more than 48 bits"};
    }
  return {};
}

// ---- device: where a thread block works

struct Own {  // what travels with a row
  const uint16_t* units;
  int bytes;

  template <typename T>
  __device__ T at(int index) const {
    uint16_t own[sizeof(T) / 2];
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) own[i] = units[index * int(sizeof(T)) / 2 + i];
    T value;
    memcpy(&value, own, sizeof value);
    return value;
  }
};

struct FoundRow {
  int number;
  const uint64_t* words;  // of a row of words
  Place place;
  uint32_t index;  // of this thread block among the row's
  bool last;
};

// The last row that starts at or before this thread block.
__device__ inline FoundRow find_row(const RowTable& rows) {
  int low = 0, high = rows.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rows.first_thread_block(middle) <= blockIdx.x ? low : high) = middle;
  }
  const Place place = Place::unpack(rows.bits(rows.place_at(low), kPlaceUnits));
  const uint32_t end = low + 1 < rows.size ? rows.first_thread_block(low + 1) : rows.thread_blocks;
  const uint64_t* words = rows.words + low * rows.row_units / 4;
  return {low, words, place, blockIdx.x - place.first_thread_block, blockIdx.x + 1 == end};
}

struct Chunk {
  const RowTable& rows;
  int units;             // where the row's begin
  const uint64_t* kind;  // KindHead, record, layout
  int64_t begin;         // the chunk's first element
  int count;
  int head;  // elements before it that are this chunk's too

  __device__ char* data(int role) const {
    return role < rows.roles ? reinterpret_cast<char*>(rows.bits(units + role * kAddressUnits, kAddressUnits))
                             : nullptr;
  }
  __device__ Own own() const {
    const int addresses = rows.roles * kAddressUnits;
    return {rows.units + units + addresses, 2 * (rows.row_units - kPlaceUnits - addresses)};
  }
};

__device__ inline Chunk find_chunk(const RowTable& rows) {
  const FoundRow found = find_row(rows);
  const Place& place = found.place;
  return {rows,
          found.number * rows.row_units,
          rows.words + place.kind,
          int64_t(found.index) * kChunk + place.head,
          found.last ? int(place.last) : kChunk,
          found.index == 0 ? int(place.head) : 0};
}

// ---- flat rows

// kWidth elements as they lie in memory. They stay so until all roles have been loaded: decoding is waiting. Roles of
// narrow dtypes leave words unused.
template <int kWidth, int kWidestBytes>
struct Raw {
  uint32_t words[(kWidth * kWidestBytes + 3) / 4] = {};

  template <int kBytes>
  __device__ void load_vector(const char* from) {
#pragma unroll
    for (int w = 0; w < kBytes / 4; w += 4) {
      const uint4 piece = ld_global_cs_16(from + w * 4);
      words[w] = piece.x, words[w + 1] = piece.y, words[w + 2] = piece.z, words[w + 3] = piece.w;
    }
  }
  template <int kBytes>
  __device__ void store_vector(char* to) const {
#pragma unroll
    for (int w = 0; w < kBytes / 4; w += 4)
      st_global_cs_16(to + w * 4, make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
  }
  template <typename Stored>
  __device__ void load_each(const Stored* from) {
    Stored stored[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) stored[j] = __ldcs(from + j);
    memcpy(words, stored, sizeof stored);
  }
  template <typename Stored>
  __device__ void store_each(Stored* to) const {
    Stored stored[kWidth];
    memcpy(stored, words, sizeof stored);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) __stcs(to + j, stored[j]);
  }

  template <typename Codec, typename S>
  __device__ void decode(S (&x)[kWidth]) const {
    typename Codec::Stored stored[kWidth];
    memcpy(stored, words, sizeof stored);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] = S(Codec::decode(stored[j]));
  }
  template <typename Codec, typename S>
  __device__ void encode(const S (&x)[kWidth]) {
    typename Codec::Stored stored[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) stored[j] = Codec::encode(x[j]);
    memcpy(words, stored, sizeof stored);
  }
};

// How an algorithm's roles are stored. Arithmetic is in the parameter's precision, but not below float.
template <typename... Codecs>
struct Format {
  using S = decltype(std::tuple_element_t<0, std::tuple<Codecs...>>::decode({}));
  static constexpr int kNarrowest = std::min({sizeof(typename Codecs::Stored)...});
  static constexpr int kWidest = std::max({sizeof(typename Codecs::Stored)...});
  static constexpr int kSpan = kVectorBytes / kNarrowest;     // elements of an access to the narrowest role
  static constexpr int kSpans = 32 / int(sizeof(S)) / kSpan;  // that a thread has in flight at once
  // Thread blocks at once on a multiprocessor: at most 64 registers a thread in fp32, 72 beside 16-bit roles, 128 in
  // fp64.
  static constexpr int kResident = sizeof(S) == 8 ? 4 : kNarrowest == 4 ? 8 : 7;
  static_assert(kSpans >= 1 && kSpan <= kMaxHead && kChunk % kSpan == 0);

  static bool matches(const TensorRow& row) {
    int role = -1;
    return row.layout == kFlat && ((++role, !row.data[role] || row.dtype[role] == Codecs::kDType) && ...);
  }
};

template <typename Algorithm, typename Format>
class ChunkRunner;

template <typename Algorithm, typename... Codecs>
class ChunkRunner<Algorithm, Format<Codecs...>> {
 public:
  using F = Format<Codecs...>;
  using S = typename F::S;
  using Scalars = typename Algorithm::template Scalars<S>;

  __device__ static void run(const RowTable& rows) {
    const Chunk chunk = find_chunk(rows);
    Scalars scalars;
    if (!Algorithm::prepare(chunk.kind + 1, chunk.own(), scalars)) return;
    const Roles roles = roles_of(chunk, Indices());
    const int tail = chunk.count % F::kSpan, end = chunk.count - tail;
    if (!roles.all_aligned)
      run_body<Body::kMixed>(roles, scalars, end);
    else if (roles.complete)
      run_body<Body::kComplete>(roles, scalars, end);
    else
      run_body<Body::kRequired>(roles, scalars, end);
    const int edge = threadIdx.x;
    if (edge >= chunk.head + tail) return;
    const int i = edge < chunk.head ? edge - chunk.head : end + edge - chunk.head;
    process<Body::kMixed, 1, 1>(roles, scalars, i, chunk.count, Indices());
  }

 private:
  static constexpr int kRoles = Algorithm::kRoles;
  using Indices = std::make_index_sequence<kRoles>;

  struct Roles {  // of one chunk
    char* data[kRoles];
    bool all_aligned;
    bool complete;
  };

  // What is known when compiling. In the first two no branch comes between the loads, so none waits for another: that
  // all roles are aligned, and that all of them or the required ones are there.
  enum class Body { kComplete, kRequired, kMixed };

  template <Body kBody>
  __device__ static bool has(const Roles& roles, int role) {
    if (!(Algorithm::kOptional >> role & 1)) return true;
    return kBody == Body::kMixed ? roles.data[role] != nullptr : kBody == Body::kComplete;
  }

  template <Body kBody>
  __device__ static void run_body(const Roles& roles, const Scalars& scalars, int end) {
#pragma unroll 1
    for (int i = threadIdx.x * F::kSpan; i < end; i += kThreads * F::kSpan * F::kSpans)
      process<kBody, F::kSpan, F::kSpans>(roles, scalars, i, end, Indices());
  }

  template <size_t... R>
  __device__ static Roles roles_of(const Chunk& chunk, std::index_sequence<R...>) {
    Roles roles;
    roles.complete = roles.all_aligned = true;
    ((roles.data[R] = address<Codecs>(chunk, R), roles.complete &= roles.data[R] != nullptr,
      roles.all_aligned &= is_aligned(roles.data[R])),
     ...);
    return roles;
  }

  __device__ static bool is_aligned(const char* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

  template <typename Codec>
  __device__ static char* address(const Chunk& chunk, int role) {
    char* data = chunk.data(role);
    return data ? data + chunk.begin * int64_t(sizeof(typename Codec::Stored)) : nullptr;
  }

  // kCopies times kWidth elements, from i and then every kThreads * kWidth, as far as they lie below end. All loads
  // come first, since the compiler may not move one across a store.
  template <Body kBody, int kWidth, int kCopies, size_t... R>
  __device__ static void process(const Roles& roles, const Scalars& scalars, int i, int end,
                                 std::index_sequence<R...>) {
    const auto vector = [&](int role) { return kWidth > 1 && (kBody != Body::kMixed || is_aligned(roles.data[role])); };
    const bool complete = (has<kBody>(roles, R) && ...);
    Raw<kWidth, F::kWidest> raw[kRoles][kCopies];
    ((has<kBody>(roles, R) ? load<Codecs>(roles.data[R], i, end, vector(R), raw[R]) : void()), ...);
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      S x[kRoles][kWidth];
      (raw[R][c].template decode<Codecs>(x[R]), ...);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) Algorithm::update(x[R][j]..., complete, scalars);
      ((Algorithm::kWrites >> R & 1 ? raw[R][c].template encode<Codecs>(x[R]) : void()), ...);
    }
    ((Algorithm::kWrites >> R & 1 && has<kBody>(roles, R) ? store<Codecs>(roles.data[R], i, end, vector(R), raw[R])
                                                          : void()),
     ...);
  }

  template <typename Codec, int kWidth, int kCopies>
  __device__ static void load(const char* data, int i, int end, bool vector, Raw<kWidth, F::kWidest> (&raw)[kCopies]) {
    using Stored = typename Codec::Stored;
#pragma unroll
    for (int c = 0; c < kCopies; ++c, i += kThreads * kWidth) {
      const Stored* from = reinterpret_cast<const Stored*>(data) + i;
      if (i < end && vector) raw[c].template load_vector<kWidth * sizeof(Stored)>(reinterpret_cast<const char*>(from));
      if (i < end && !vector) raw[c].load_each(from);
    }
  }
  template <typename Codec, int kWidth, int kCopies>
  __device__ static void store(char* data, int i, int end, bool vector, const Raw<kWidth, F::kWidest> (&raw)[kCopies]) {
    using Stored = typename Codec::Stored;
#pragma unroll
    for (int c = 0; c < kCopies; ++c, i += kThreads * kWidth) {
      Stored* to = reinterpret_cast<Stored*>(data) + i;
      if (i < end && vector) raw[c].template store_vector<kWidth * sizeof(Stored)>(reinterpret_cast<char*>(to));
      if (i < end && !vector) raw[c].store_each(to);
    }
  }
};

template <typename Algorithm, typename Format>
__global__ void __launch_bounds__(kThreads, Format::kResident)
    elementwise_kernel(const RowTable __grid_constant__ rows) {
  ChunkRunner<Algorithm, Format>::run(rows);
}

// ---- any other row

template <typename S>
__device__ inline S load_any(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return S(static_cast<const float*>(data)[i]);
    case DType::kFloat64: return S(static_cast<const double*>(data)[i]);
    case DType::kBFloat16: return S(BFloat16::decode(static_cast<const uint16_t*>(data)[i]));
    default: return S(Float16::decode(static_cast<const uint16_t*>(data)[i]));
  }
}

template <typename S>
__device__ inline void store_any(DType dtype, void* data, int64_t i, S x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[i] = Float32::encode(x); break;
    case DType::kFloat64: static_cast<double*>(data)[i] = Float64::encode(x); break;
    case DType::kBFloat16: static_cast<uint16_t*>(data)[i] = BFloat16::encode(x); break;
    default: static_cast<uint16_t*>(data)[i] = Float16::encode(float(x)); break;
  }
}

// Element i of the row's order, in each role.
template <int kRoles>
__device__ inline void find_element(const uint64_t* layout, int ndim, int roles, int64_t i, int64_t (&at)[kRoles]) {
#pragma unroll
  for (int role = 0; role < kRoles; ++role) at[role] = ndim ? 0 : i;
#pragma unroll 1
  for (int d = ndim - 1; d >= 0; --d) {
    const uint64_t rest = i, size = layout[d];  // most rows are small enough for the short division
    const uint64_t quotient = rest >> 32 || size >> 32 ? rest / size : uint32_t(rest) / uint32_t(size);
    const int64_t index = int64_t(rest - quotient * size);
    i = int64_t(quotient);
#pragma unroll
    for (int role = 0; role < kRoles; ++role)
      if (role < roles) at[role] += index * int64_t(layout[ndim * (1 + role) + d]);
  }
}

template <typename Algorithm, typename S>
struct AnyRunner {
  static constexpr int kRoles = Algorithm::kRoles;

  __device__ static void run(const RowTable& rows) {
    const Chunk chunk = find_chunk(rows);
    typename Algorithm::template Scalars<S> scalars;
    if (!Algorithm::prepare(chunk.kind + 1, chunk.own(), scalars)) return;
    KindHead head;
    memcpy(&head, chunk.kind, sizeof head);
    for (int i = threadIdx.x; i < chunk.count; i += kThreads) {
      int64_t at[kRoles];
      find_element(chunk.kind + 1 + head.record_words, head.ndim, rows.roles, chunk.begin + i, at);
      process(chunk, head, at, scalars, std::make_index_sequence<kRoles>());
    }
  }

  template <typename Scalars, size_t... R>
  __device__ static void process(const Chunk& chunk, const KindHead& head, const int64_t (&at)[kRoles],
                                 const Scalars& scalars, std::index_sequence<R...>) {
    S x[kRoles] = {};
    void* const data[] = {chunk.data(R)...};
    ((data[R] ? void(x[R] = load_any<S>(head.dtype[R], data[R], at[R])) : void()), ...);
    Algorithm::update(x[R]..., (data[R] && ...), scalars);
    ((Algorithm::kWrites >> R & 1 && data[R] ? store_any(head.dtype[R], data[R], at[R], x[R]) : void()), ...);
  }
};

template <typename Algorithm, typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 4 : 8)
    any_elementwise_kernel(const RowTable __grid_constant__ rows) {
  AnyRunner<Algorithm, S>::run(rows);
}

// ---- host: launching

template <typename... F>
struct FormatList {
  static constexpr int kAny = sizeof...(F);  // classes of rows: one for each format, then two of any_elementwise_kernel
  static int class_of(const TensorRow& row) {
    int index = 0;
    if ((... || (F::matches(row) || (++index, false)))) return index;
    return kAny + (row.dtype[0] == DType::kFloat64);
  }
};

template <typename Kernel>
inline Status launch_packed(Kernel* kernel, const RowTable& rows, cudaStream_t stream, int threads = kThreads,
                            size_t smem_bytes = 0) {
  if (rows.size == 0) return {};
  return status_of(launch(kernel, dim3(rows.thread_blocks), dim3(threads), smem_bytes, stream, rows));
}

// Launches a kernel over the rows of one class, as many at a time as fit.
template <typename S, typename Formats, typename Kernel, typename Algorithm>
inline Status launch_class(int row_class, Kernel* kernel, const Algorithm& algorithm, const TensorTable& table,
                           int roles, cudaStream_t stream) {
  RowPacker packer(roles, algorithm.template own_bytes<S>());
  for (const TensorRow* row = table.rows; row < table.rows + table.size; ++row) {
    if (Formats::class_of(*row) != row_class) continue;
    const int head = row_class < Formats::kAny ? head_of(*row, roles) : 0;
    if (packer.add<S>(table, *row, head, algorithm)) continue;
    if (const Status status = launch_packed(kernel, packer.rows(), stream); !status) return status;
    packer.clear();
    if (!packer.add<S>(table, *row, head, algorithm))
      return {"an array has too many elements or more than 255 dimensions"};
  }
  return launch_packed(kernel, packer.rows(), stream);
}

// Runs the algorithm over the whole table.
template <typename Algorithm, typename... F>
inline Status launch_elementwise(const Algorithm& algorithm, const TensorTable& table, FormatList<F...>,
                                 cudaStream_t stream) {
  using Formats = FormatList<F...>;
  int roles = 1;
  unsigned classes = 0;
  for (const TensorRow* row = table.rows; row < table.rows + table.size; ++row) {
    for (int role = roles; role < Algorithm::kRoles; ++role)
      if (row->data[role]) roles = role + 1;
    classes |= 1u << Formats::class_of(*row);
  }
  Status status = check_alignment(table);
  int next = 0;
  const auto run = [&](auto s, auto* kernel) {
    const int row_class = next++;
    if (status && classes >> row_class & 1)
      status = launch_class<decltype(s), Formats>(row_class, kernel, algorithm, table, roles, stream);
  };
  (run(typename F::S(), elementwise_kernel<Algorithm, F>), ...);
  run(float(), any_elementwise_kernel<Algorithm, float>);
  run(double(), any_elementwise_kernel<Algorithm, double>);
  return status;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
