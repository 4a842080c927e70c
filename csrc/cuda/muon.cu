// Muon on a GPU: the formulas of math/muon.h around Newton-Schulz, over matrices in a tensor table.
//
// Before the products 16 bytes per element in fp32 (g m in, m u out) and after them 12 (p o in, p out), NorMuon's sums
// 4 more; a handful of operations per element: memory-bound. Elementwise parts and NorMuon's sums have the CPU's bits.
// NorMuon adds two operations per element in double, columns three.
#define FUSEDOPT_TARGET cuda
#include <algorithm>
#include <array>
#include <vector>

#include "cuda/device_number.cuh"
#include "cuda/muon.h"
#include "cuda/newton_schulz.h"
#include "cuda/units.cuh"

namespace fusedopt::cuda {
namespace {

using Role = MuonRole;
constexpr int kElementRoles = Role::kRowSq;  // those with a value per element
constexpr int kRowLanes = NorMuonOrder::kRowLanes, kLineLanes = NorMuonOrder::kLineLanes;

struct PreparedMuon {  // one tensor's options, made ready on the device
  MuonScalars<double> scalars;
  int64_t skip;  // found_inf was set
};

// A row of the kernels' table is a matrix: the addresses of its first elements (of the tensor's first where the tensor
// has strides), of its first line's statistic, of u or o, and of its lines' scales, behind which their parts lie.
enum RowWord { kParam, kGrad, kMomentum, kRowSq, kValues, kLines, kRowWords };
static_assert(kGrad == int(Role::kGrad) && kMomentum == int(Role::kMomentum) && kRowSq == int(Role::kRowSq));

struct MatrixKind {  // a row's kind; sizes[ndim] and strides[ndim] of each role follow it
  const PreparedMuon* scalars;
  int64_t rows, columns, stride;
  int64_t offset;  // in a tensor that has strides
  double scale;
  DType dtype[Role::kCount];
  int16_t ndim;  // 0: flat
  bool joined, by_column;

  HOST_DEVICE int64_t numel() const { return rows * columns; }
  HOST_DEVICE int64_t lines() const { return by_column ? columns : rows; }
  HOST_DEVICE int64_t pieces() const {  // of a line
    const int64_t piece = by_column ? NorMuonOrder::kColumnPiece : NorMuonOrder::kRowPiece;
    return ((by_column ? rows : columns) + piece - 1) / piece;
  }
};
constexpr int kKindWords = sizeof(MatrixKind) / sizeof(uint64_t);
static_assert(sizeof(MatrixKind) == 7 * sizeof(uint64_t));

// ---- device: a matrix

struct Matrix {
  const uint64_t* row;
  MatrixKind kind;
  const uint64_t* layout;
  uint32_t index;  // of this thread block among the matrix's

  __device__ explicit Matrix(const RowTable& rows) {
    const FoundRow found = find_row(rows);
    const uint64_t* words = rows.words + found.place.kind;
    row = found.words;
    memcpy(&kind, words, sizeof kind);
    layout = words + kKindWords;
    index = found.index;
  }

  // False: the step is to be skipped.
  template <typename S>
  __device__ bool scalars(MuonScalars<S>& k) const {
    if (kind.scalars->skip) return false;
    k = kind.scalars->scalars.template as<S>();
    return true;
  }

  __device__ int64_t row_of(int64_t i) const {  // most matrices are small enough for the short division
    return kind.numel() >> 32 ? i / kind.columns : uint32_t(i) / uint32_t(kind.columns);
  }
  __device__ int64_t in_tensor(int64_t i) const {
    return kind.joined ? i : i + row_of(i) * (kind.stride - kind.columns);
  }
  __device__ char* data(int role, int64_t at) const {
    return address<char>(row, role) + at * bytes_of(kind.dtype[role]);
  }
  template <typename S>
  __device__ S load(int role, const int64_t (&at)[kElementRoles]) const {
    return load_any<S>(kind.dtype[role], address<void>(row, role), at[role]);
  }
  template <typename S>
  __device__ void store(int role, const int64_t (&at)[kElementRoles], S x) const {
    store_any(kind.dtype[role], address<void>(row, role), at[role], x);
  }
  __device__ void find(int64_t i, int64_t (&at)[kElementRoles]) const {
    find_element(layout, kind.ndim, kElementRoles, kind.offset + in_tensor(i), at);
  }

  // Whether units of this role can be read and written 16 bytes at a time. Those of the workspace always can.
  template <typename S, int kWidth>
  __device__ bool has_vectors(int role) const {
    const int size = bytes_of(kind.dtype[role]);
    return kind.ndim == 0 && size <= int(sizeof(S)) && size * kWidth >= kVectorBytes &&
           reinterpret_cast<uintptr_t>(address<char>(row, role)) % kVectorBytes == 0 &&
           (kind.joined || kind.stride * size % kVectorBytes == 0);
  }
};

// Calls whole(i) for units of this thread block's elements, from i on, where there are vectors, and element(i) for the
// others.
template <int kWidth, typename Whole, typename Element>
__device__ void for_each_unit(const Matrix& matrix, bool vectors, Whole whole, Element element) {
  const int64_t begin = int64_t(matrix.index) * kChunk, left = matrix.kind.numel() - begin;
  const int count = left < kChunk ? int(left) : kChunk, units = vectors ? count - count % kWidth : 0;
#pragma unroll 1
  for (int i = threadIdx.x * kWidth; i < units; i += kThreads * kWidth) whole(begin + i);
#pragma unroll 1
  for (int i = units + threadIdx.x; i < count; i += kThreads) element(begin + i);
}

// ---- device: before and after the products

template <typename S, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 4 : 8)
    muon_before_kernel(const RowTable __grid_constant__ rows) {
  const Matrix matrix(rows);
  MuonScalars<S> k;
  if (!matrix.scalars(k)) return;
  S* const values = address<S>(matrix.row, kValues);
  const DType grad_dtype = matrix.kind.dtype[kGrad], momentum_dtype = matrix.kind.dtype[kMomentum];
  const bool vectors = (matrix.kind.joined || matrix.kind.columns % kWidth == 0) &&
                       matrix.has_vectors<S, kWidth>(kGrad) && matrix.has_vectors<S, kWidth>(kMomentum);
  const auto whole = [&](int64_t i) {
    const int64_t at = matrix.in_tensor(i);
    RawUnit<S, kWidth> raw_grad, raw_momentum;
    load_unit<S, kWidth>(grad_dtype, matrix.data(kGrad, at), raw_grad);
    load_unit<S, kWidth>(momentum_dtype, matrix.data(kMomentum, at), raw_momentum);
    S u[kWidth] = {}, momentum[kWidth] = {};
    decode_unit<S, kWidth>(grad_dtype, raw_grad, u);
    decode_unit<S, kWidth>(momentum_dtype, raw_momentum, momentum);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) u[j] = muon_momentum(u[j], momentum[j], k);
    write_unit(values + i, u);
    store_unit<S, kWidth>(momentum_dtype, matrix.data(kMomentum, at), momentum);
  };
  for_each_unit<kWidth>(matrix, vectors, whole, [&](int64_t i) {
    int64_t at[kElementRoles];
    matrix.find(i, at);
    S momentum = matrix.load<S>(kMomentum, at);
    values[i] = muon_momentum(matrix.load<S>(kGrad, at), momentum, k);
    matrix.store(kMomentum, at, momentum);
  });
}

// What a matrix's o is multiplied by: NorMuon's scale of a row goes with the rate, that of a column with o.
struct Rates {
  const double* lines;  // nullptr: Muon
  double rate;
  bool by_column;

  __device__ Rates(const Matrix& matrix, double minus_lr)
      : lines(address<const double>(matrix.row, kLines)),
        rate(minus_lr * matrix.kind.scale),
        by_column(matrix.kind.by_column) {}

  // Of n elements of a row; returns their rate.
  template <typename S, int kWidth>
  __device__ S apply(const Matrix& matrix, int64_t i, S (&o)[kWidth]) const {
    if (!lines) return S(rate);
    const int64_t row = matrix.row_of(i);
    if (!by_column) return S(rate * lines[row]);
    const double* const scales = lines + (i - row * matrix.kind.columns);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) o[j] = S(o[j] * scales[j]);
    return S(rate);
  }
};

template <typename S, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 4 : 8)
    muon_after_kernel(const RowTable __grid_constant__ rows) {
  const Matrix matrix(rows);
  MuonScalars<S> k;
  if (!matrix.scalars(k)) return;
  const S* const values = address<const S>(matrix.row, kValues);
  const Rates rates(matrix, k.rate);
  const DType dtype = matrix.kind.dtype[kParam];
  const bool vectors = ((matrix.kind.joined && !rates.lines) || matrix.kind.columns % kWidth == 0) &&
                       matrix.has_vectors<S, kWidth>(kParam);
  const auto whole = [&](int64_t i) {
    char* const data = matrix.data(kParam, matrix.in_tensor(i));
    RawUnit<S, kWidth> raw;
    load_unit<S, kWidth>(dtype, data, raw);
    S o[kWidth], param[kWidth] = {};
    read_unit(values + i, o);
    decode_unit<S, kWidth>(dtype, raw, param);
    const S rate = rates.apply(matrix, i, o);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) param[j] = muon_param(param[j], o[j], rate, k);
    store_unit<S, kWidth>(dtype, data, param);
  };
  for_each_unit<kWidth>(matrix, vectors, whole, [&](int64_t i) {
    int64_t at[kElementRoles];
    matrix.find(i, at);
    S o[1] = {values[i]};
    const S rate = rates.apply(matrix, i, o);
    matrix.store(kParam, at, muon_param(matrix.load<S>(kParam, at), o[0], rate, k));
  });
}

// ---- device: NorMuon's statistics

__device__ double square(double x) { return x * x; }

// The parts of lines: a thread each of a column's pieces, kRowLanes each of a row's.
template <typename S>
__global__ void __launch_bounds__(kThreads) normuon_sums_kernel(const RowTable __grid_constant__ rows) {
  const Matrix matrix(rows);
  const MatrixKind& kind = matrix.kind;
  const S* const o = address<const S>(matrix.row, kValues);
  const int64_t columns = kind.columns, lines = kind.lines(), pieces = kind.pieces();
  double* const parts = address<double>(matrix.row, kLines) + lines;
  double sum = 0;
  if (kind.by_column) {
    const int64_t part = int64_t(matrix.index) * kThreads + threadIdx.x, piece = part / lines;
    if (piece >= pieces) return;
    const int64_t first = piece * NorMuonOrder::kColumnPiece, left = kind.rows - first;
    const int n = left < NorMuonOrder::kColumnPiece ? int(left) : int(NorMuonOrder::kColumnPiece);
    const int64_t column = part - piece * lines;
    const S* from = o + first * columns + column;
#pragma unroll 8
    for (int i = 0; i < n; ++i, from += columns) sum += square(*from);
    parts[column * pieces + piece] = sum;
    return;
  }
  const int64_t part = int64_t(matrix.index) * (kThreads / kRowLanes) + threadIdx.x / kRowLanes;
  const int64_t line = part / pieces, first = (part - line * pieces) * NorMuonOrder::kRowPiece;
  const int64_t left = line < lines ? columns - first : 0;
  const int n = left < NorMuonOrder::kRowPiece ? int(left) : int(NorMuonOrder::kRowPiece),
            lane = threadIdx.x % kRowLanes;
  const S* const from = o + line * columns + first;
#pragma unroll 8
  for (int i = lane; i < n; i += kRowLanes) sum += square(from[i]);
  for (int half = kRowLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half, kRowLanes);
  if (lane == 0 && line < lines) parts[part] = sum;
}

// From parts to the lines' scales; updates v. A thread block for each matrix.
__global__ void __launch_bounds__(kLineLanes) normuon_scales_kernel(const RowTable __grid_constant__ rows) {
  __shared__ double before[kLineLanes], after[kLineLanes];  // squared norms
  const Matrix matrix(rows);
  MuonScalars<double> k;
  if (!matrix.scalars(k)) return;
  const int64_t lines = matrix.kind.lines(), pieces = matrix.kind.pieces();
  const double count = double(matrix.kind.numel() / lines);
  double* const scales = address<double>(matrix.row, kLines);
  const double* const parts = scales + lines;
  float* const row_sq = address<float>(matrix.row, kRowSq);
  double own_before = 0, own_after = 0;
#pragma unroll 1
  for (int64_t line = threadIdx.x; line < lines; line += kLineLanes) {
    double sum = 0, v = row_sq[line];
    for (int64_t piece = 0; piece < pieces; ++piece) sum += parts[line * pieces + piece];
    const double scale = normuon_row(v, sum, count, k.beta2);
    row_sq[line] = float(v);
    scales[line] = scale;
    own_before += sum;
    own_after += sum * scale * scale;
  }
  before[threadIdx.x] = own_before, after[threadIdx.x] = own_after;
  for (int half = kLineLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      before[threadIdx.x] += before[threadIdx.x + half];
      after[threadIdx.x] += after[threadIdx.x + half];
    }
  }
  __syncthreads();
  const double keep = sqrt(before[0]) / (sqrt(after[0]) + kNorMuonEps);
  for (int64_t line = threadIdx.x; line < lines; line += kLineLanes) scales[line] *= keep;
}

// ---- device: numbers

__global__ void __launch_bounds__(kThreads)
    muon_prepare_kernel(const Batch<MuonDeviceOptions> __grid_constant__ options, AdamWLossScale loss_scale,
                        PreparedMuon* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= options.size) return;
  const MuonDeviceOptions& own = options.items[i];
  MuonOptions numbers = own.options;
  if (own.lr.data) numbers.lr = read(own.lr);
  if (own.weight_decay.data) numbers.weight_decay = read(own.weight_decay);
  if (own.momentum.data) numbers.momentum = read(own.momentum);
  const bool scaled = loss_scale.grad_scale.data;
  const double inv_grad_scale = scaled ? 1.0 / read(loss_scale.grad_scale) : loss_scale.inv_grad_scale;
  prepared[i] = {muon_scalars(numbers, inv_grad_scale), is_set(loss_scale.found_inf)};
}

// ---- host

#ifndef FUSEDOPT_MUON_WAVE  // tests take less
#define FUSEDOPT_MUON_WAVE (1 << 26)
#endif
constexpr int64_t kWave = FUSEDOPT_MUON_WAVE;  // elements: enough for the products of one shape to fill a GPU
constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

MatrixKind kind_of(const MuonMatrix& m) {
  MatrixKind kind = {};
  kind.rows = m.rows, kind.columns = m.columns, kind.stride = m.stride;
  kind.scale = m.scale;
  kind.joined = m.joined(), kind.by_column = m.by_column;
  return kind;
}

// What the matrices of a wave need: for each its values and, for NorMuon, its lines' scales and their parts.
int64_t values_bytes(const MuonMatrix& m, bool wide) {
  return aligned(m.numel() * int64_t(wide ? sizeof(double) : sizeof(float)));
}
int64_t lines_bytes(const MuonMatrix& m, bool normuon) {
  return normuon ? aligned(m.lines() * (1 + kind_of(m).pieces()) * int64_t(sizeof(double))) : 0;
}

std::vector<NewtonSchulzMatrix> products_of(const MuonMatrix* first, const MuonMatrix* last, bool wide, char* values) {
  std::vector<NewtonSchulzMatrix> products;
  const DType dtype = wide ? DType::kFloat64 : DType::kFloat32;
  for (const MuonMatrix* m = first; m < last; values += values_bytes(*m++, wide))
    products.push_back({values, values, m->rows, m->columns, m->columns, m->columns, dtype, dtype});
  return products;
}

struct Workspace {  // bytes of its parts, in their order
  int64_t prepared, products = 0, lines = 0, values = 0;

  Workspace(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int64_t options_size, bool normuon)
      : prepared(aligned(options_size * int64_t(sizeof(PreparedMuon)))) {
    for_each_muon_wave(matrices, runs, count, kWave, [&](const MuonRun& run, int64_t first, int64_t last) {
      int64_t own_lines = 0, own_values = 0;
      for (const MuonMatrix* m = matrices + first; m < matrices + last; ++m) {
        own_lines += lines_bytes(*m, normuon);
        own_values += values_bytes(*m, run.wide);
      }
      const auto own_products = products_of(matrices + first, matrices + last, run.wide, nullptr);
      products =
          std::max(products, aligned(newton_schulz_workspace_bytes(own_products.data(), last - first, run.schedule)));
      lines = std::max(lines, own_lines);
      values = std::max(values, own_values);
    });
  }
  int64_t bytes() const { return prepared + products + lines + values + kAlignment; }
};

class MatrixPacker : public TablePacker {
 public:
  MatrixPacker() : TablePacker(kRowWords) {}

  // False, and nothing changed, if the row does not fit beside those already here.
  bool add(const uint64_t* row, const MatrixKind& kind, const int64_t* layout, int64_t thread_blocks) {
    const bool shares = rows().size > 0 && layout == last_layout_ && memcmp(&kind, &last_, sizeof kind) == 0;
    const int64_t layout_words = kind.ndim * int64_t(1 + kElementRoles);
    if (!fits(thread_blocks, shares ? 0 : kKindWords + layout_words)) return false;
    if (!shares) {
      uint64_t* words = add_kind(kKindWords + layout_words);
      memcpy(words, &kind, sizeof kind);
      if (layout) memcpy(words + kKindWords, layout + 1, layout_words * sizeof(int64_t));
    }
    add_row(row, thread_blocks, 1, 0);
    last_ = kind, last_layout_ = layout;
    return true;
  }

 private:
  MatrixKind last_ = {};
  const int64_t* last_layout_ = nullptr;
};

// Launches kernels over the matrices of a wave.
class Wave {
 public:
  Wave(const TensorTable& table, const MuonMatrix* first, const MuonMatrix* last, bool wide,
       const PreparedMuon* prepared, char* lines, char* values, cudaStream_t stream)
      : table_(table),
        first_(first),
        last_(last),
        wide_(wide),
        normuon_(table.roles > Role::kRowSq),
        prepared_(prepared),
        lines_(lines),
        values_(values),
        stream_(stream) {}

  Status before() {
    return elements({muon_before_kernel<float, 4>, muon_before_kernel<float, 8>}, muon_before_kernel<double, 4>, kGrad,
                    kMomentum);
  }
  Status after() {
    return elements({muon_after_kernel<float, 4>, muon_after_kernel<float, 8>}, muon_after_kernel<double, 4>, kParam,
                    kParam);
  }
  Status products(const NewtonSchulzSchedule& schedule, void* workspace) const {
    const auto products = products_of(first_, last_, wide_, values_);
    return launch_newton_schulz(products.data(), int64_t(products.size()), schedule, workspace, stream_);
  }
  Status scales() {
    if (!normuon_) return {};
    const auto parts = [](const MatrixKind& kind) {
      const int64_t at_once = kind.by_column ? kThreads : kThreads / kRowLanes;
      return (kind.lines() * kind.pieces() + at_once - 1) / at_once;
    };
    const auto all = [](const MatrixKind&) { return true; };
    const Status status =
        each_matrix(wide_ ? normuon_sums_kernel<double> : normuon_sums_kernel<float>, kThreads, parts, all);
    if (!status) return status;
    return each_matrix(normuon_scales_kernel, kLineLanes, [](const MatrixKind&) { return int64_t(1); }, all);
  }

 private:
  using Kernel = decltype(normuon_scales_kernel);

  // In units of 4 elements, in units of 8 where one of two roles has 16 bits.
  Status elements(std::array<Kernel*, 2> kernels, Kernel* wide, int role, int other) {
    const auto chunks = [](const MatrixKind& kind) { return (kind.numel() + kChunk - 1) / kChunk; };
    if (wide_) return each_matrix(wide, kThreads, chunks, [](const MatrixKind&) { return true; });
    Status status;
    for (const bool narrow : {false, true})
      if (status)
        status = each_matrix(kernels[narrow], kThreads, chunks, [&](const MatrixKind& kind) {
          return narrow == (size_of(kind.dtype[role]) == 2 || size_of(kind.dtype[other]) == 2);
        });
    return status;
  }

  template <typename ThreadBlocks, typename Chosen>
  Status each_matrix(Kernel* kernel, int threads, ThreadBlocks thread_blocks, Chosen chosen) {
    MatrixPacker packer;
    char *lines = lines_, *values = values_;
    for (const MuonMatrix* m = first_; m < last_; ++m) {
      const TensorRow& row = table_.rows[m->row];
      const int64_t* const layout = row.layout == kFlat ? nullptr : table_.layouts + row.layout;
      const MatrixKind kind = kind_on(row, layout, *m);
      uint64_t words[kRowWords];
      for (int role = 0; role < kElementRoles; ++role)
        words[role] = address_of(row, role) + (layout ? 0 : m->offset * size_of(row.dtype[role]));
      words[kRowSq] = normuon_ ? address_of(row, kRowSq) + m->first_line * sizeof(float) : 0;
      words[kLines] = normuon_ ? reinterpret_cast<uintptr_t>(lines) : 0;
      words[kValues] = reinterpret_cast<uintptr_t>(values);
      lines += lines_bytes(*m, normuon_);
      values += values_bytes(*m, wide_);
      if (!chosen(kind) || packer.add(words, kind, layout, thread_blocks(kind))) continue;
      if (const Status status = launch_packed(kernel, packer.rows(), stream_, threads); !status) return status;
      packer.clear();
      if (!packer.add(words, kind, layout, thread_blocks(kind)))
        return {"an array has too many elements or more than 1000 dimensions"};
    }
    return launch_packed(kernel, packer.rows(), stream_, threads);
  }

  MatrixKind kind_on(const TensorRow& row, const int64_t* layout, const MuonMatrix& m) const {
    MatrixKind kind = kind_of(m);
    kind.scalars = prepared_ + row.scalars;
    if (layout) kind.offset = m.offset, kind.ndim = int16_t(layout[0]);
    std::copy_n(row.dtype, int(Role::kCount), kind.dtype);
    return kind;
  }

  const TensorTable& table_;
  const MuonMatrix *first_, *last_;
  const bool wide_, normuon_;
  const PreparedMuon* prepared_;
  char *lines_, *values_;
  cudaStream_t stream_;
};

}  // namespace

int64_t muon_workspace_bytes(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int64_t options_size,
                             bool normuon) {
  return Workspace(matrices, runs, count, options_size, normuon).bytes();
}

Status launch_muon(const TensorTable& table, const MuonDeviceOptions* options, int64_t options_size,
                   const AdamWLossScale& loss_scale, const MuonMatrix* matrices, const MuonRun* runs, int64_t count,
                   void* workspace, cudaStream_t stream) {
  Status status = check_alignment(table);
  if (!status) return status;
  const Workspace sizes(matrices, runs, count, options_size, table.roles > Role::kRowSq);
  char* const begin = reinterpret_cast<char*>(aligned(reinterpret_cast<intptr_t>(workspace)));
  auto* const prepared = reinterpret_cast<PreparedMuon*>(begin);
  char* const products = begin + sizes.prepared;
  char* const lines = products + sizes.products;
  status = launch_batches(options, options_size, [&](const auto& batch, dim3 grid, int64_t first) {
    return launch(muon_prepare_kernel, grid, dim3(kThreads), 0, stream, batch, loss_scale, prepared + first);
  });
  for_each_muon_wave(matrices, runs, count, kWave, [&](const MuonRun& run, int64_t first, int64_t last) {
    Wave wave(table, matrices + first, matrices + last, run.wide, prepared, lines, lines + sizes.lines, stream);
    if (status) status = wave.before();
    if (status) status = wave.products(run.schedule, products);
    if (status) status = wave.scales();
    if (status) status = wave.after();
  });
  return status;
}

}  // namespace fusedopt::cuda
