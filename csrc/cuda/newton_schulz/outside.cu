// Reading Newton–Schulz's matrices, normalising them, and writing the results.
//
// Two passes over the input: the largest magnitude (and, of a square matrix, how it is to be turned), then the copy
// into the workspace and its sum of squares; one over the result. In float32 that is 12 bytes per element read and 8
// written, with half precision in the workspace 10 and 6. Scaling by a power of two is exact; the division by the norm
// happens in the first products' factors and costs no rounding of its own.
//
// Sums are float64 and have one order: over each tile of 64 x 64 of the turned matrix, then over tiles. There is no
// atomic.
#define FUSEDOPT_TARGET cuda
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/newton_schulz/outside.h"
#include "cuda/newton_schulz/vectors.cuh"
#include "math/value.h"

namespace fusedopt::cuda {
namespace {

constexpr int kVectorBytes = 16;

// One value of all threads' ones; every thread gets it.
template <typename T, typename Combine>
__device__ T combine_threads(T value, Combine combine) {
  __shared__ T of_warp[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  T result = of_warp[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) result = combine(result, of_warp[i]);
  __syncthreads();
  return result;
}

__device__ double larger(double a, double b) { return maximum(a, b); }
__device__ int64_t earlier(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ double add(double a, double b) { return a + b; }

// ---- inspecting

// Some rows of a matrix as it lies in memory: the largest magnitude, for NaNs have the largest bits, and the first pair
// of mirrored elements that differ.
template <typename Codec>
__device__ Finding inspect_rows(const OuterMatrix& g, int64_t first_row, int64_t last_row, int64_t columns,
                                bool square) {
  using Stored = typename Codec::Stored;
  using Bits = std::conditional_t<sizeof(Stored) == 8, uint64_t, uint32_t>;
  const auto* const in = static_cast<const Stored*>(g.data);
  const auto bits_of = [](Stored x) {
    if constexpr (sizeof(Stored) == 2)
      return Bits(x & 0x7fff);
    else
      return Bits(bit_cast<Bits>(x) & Bits(-1) >> 1);
  };
  int across = 1;  // threads side by side in a row
  while (across < kThreads && across < columns) across *= 2;
  const int down = kThreads / across, lane = int(threadIdx.x) % across;
  Bits largest = 0;
  int64_t first_difference = kNoDifference;
  for (int64_t i = first_row + int(threadIdx.x) / across; i < last_row; i += down)
    for (int64_t j = lane; j < columns; j += across) {
      const Stored x = in[i * g.row + j * g.column];
      const Bits bits = bits_of(x);
      largest = bits > largest ? bits : largest;
      if (square && j > i && first_difference == kNoDifference &&
          Codec::decode(x) != Codec::decode(in[j * g.row + i * g.column]))
        first_difference = i * columns + j;
    }
  double magnitude;
  if constexpr (sizeof(Stored) == 2)
    magnitude = Codec::decode(Stored(largest));
  else
    magnitude = Codec::decode(bit_cast<Stored>(largest));
  return {magnitude, first_difference};
}

__global__ void __launch_bounds__(kThreads)
    newton_schulz_inspect_kernel(const OuterMatrices __grid_constant__ in, int64_t n, int64_t m, Finding* findings) {
  OuterMatrix g = in.items[blockIdx.y];
  int64_t rows = n, columns = m;
  if (g.row < g.column) {  // walk as it lies; a pair is the same pair from both sides
    const int64_t stride = g.row;
    g.row = g.column, g.column = stride, rows = m, columns = n;
  }
  const int64_t height = (rows + gridDim.x - 1) / gridDim.x, first = blockIdx.x * height;
  const int64_t last = first + height < rows ? first + height : rows;
  Finding own = {0, kNoDifference};
  with_codec(g.dtype, [&](auto codec) { own = inspect_rows<decltype(codec)>(g, first, last, columns, n == m); });
  own.largest = combine_threads(own.largest, larger);
  own.first_difference = combine_threads(own.first_difference, earlier);
  if (threadIdx.x == 0) findings[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = own;
}

// ---- loading

__device__ Turn turn_of(const OuterMatrix& g, int64_t n, int64_t first_difference) {
  if (first_difference == kNoDifference) return Turn::kSymmetric;
  const int64_t i = first_difference / n, j = first_difference % n;
  bool transposed = false;
  with_codec(g.dtype, [&](auto codec) {
    using Codec = decltype(codec);
    const auto* const in = static_cast<const typename Codec::Stored*>(g.data);
    transposed = Codec::decode(in[i * g.row + j * g.column]) < Codec::decode(in[j * g.row + i * g.column]);
  });
  return transposed ? Turn::kTransposed : Turn::kNo;
}

__device__ void turn(OuterMatrix& g, Turn turn) {
  if (turn != Turn::kTransposed) return;
  const int64_t stride = g.row;
  g.row = g.column, g.column = stride;
}

// A tile of 64 x 64, and how threads walk it: `place` gives the i-th element of this thread, by short strides.
template <typename T>
struct Square {
  static constexpr int kStride = kTile + kVectorBytes / int(sizeof(T));
  T at[kTile][kStride];
};
constexpr int kPerThread = kTile * kTile / kThreads;

struct Place {
  int row, column;
};
__device__ Place place(int i, bool by_rows) {
  const int index = i * kThreads + int(threadIdx.x);
  return by_rows ? Place{index / kTile, index % kTile} : Place{index % kTile, index / kTile};
}

// Rounded to dtype, as the workspace holds it: half precision is its own, wider numbers may have to have fewer bits.
template <typename Codec, typename V>
__device__ typename Codec::Stored rounded(V value, DType dtype) {
  typename Codec::Stored result;
  if constexpr (sizeof(result) == 2)
    result = encode<Codec>(value);
  else
    with_codec(dtype, [&](auto rounding) {
      using Rounding = decltype(rounding);
      result = typename Codec::Stored(Rounding::decode(encode<Rounding>(value)));
    });
  return result;
}

template <typename Codec>
struct LoadArguments {
  Batch<Codec> batch;
  DType dtype;
};

// Fills the tile with the caller's elements, scaled by 2^exponent and rounded to dtype; zeros outside of the matrix,
// NaN throughout if there is one.
template <typename Codec>
__device__ void read_tile(Square<typename Codec::Stored>& tile, const OuterMatrix& g, const LoadArguments<Codec>& load,
                          int64_t row0, int64_t column0, double largest) {
  const bool finite = largest - largest == 0, by_rows = g.column <= g.row;
  const int exponent = finite && largest > 0 ? kTopExponent - exponent_of(largest) : 0;
  with_codec(g.dtype, [&](auto codec) {
    using Outer = decltype(codec);
    using V = decltype(Outer::decode({}));
    const auto* const in = static_cast<const typename Outer::Stored*>(g.data);
    // In two steps, since the power itself may be out of range.
    const V first = power_of_two<V>(exponent / 2), second = power_of_two<V>(exponent - exponent / 2);
    for (int i = 0; i < kPerThread; ++i) {
      const Place at = place(i, by_rows);
      const int64_t row = row0 + at.row, column = column0 + at.column;
      V value = 0;
      if (row < load.batch.n && column < load.batch.m)
        value = finite ? Outer::decode(in[row * g.row + column * g.column]) * first * second : V(__builtin_nanf(""));
      tile.at[at.row][at.column] = rounded<Codec>(value, load.dtype);
    }
  });
}

// Writes 16 elements of one of the tile's rows to the workspace; returns their sum of squares.
template <typename Codec>
__device__ double write_row(const Square<typename Codec::Stored>& tile, const Batch<Codec>& batch,
                            typename Codec::Stored* x, int64_t row0, int64_t column0) {
  using Stored = typename Codec::Stored;
  constexpr int kVector = kVectorBytes / int(sizeof(Stored));
  const int row = int(threadIdx.x) / (kTile / kPerThread),
            column = int(threadIdx.x) % (kTile / kPerThread) * kPerThread;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const double value = Codec::decode(tile.at[row][column + i]);
    sum = fma(value, value, sum);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; i += kVector)
    if (row0 + row < batch.n && column0 + column + i < batch.m)
      store_16(x + (row0 + row) * batch.x_stride + column0 + column + i, load_16(&tile.at[row][column + i]));
  return sum;
}

template <typename Codec>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_load_kernel(const OuterMatrices __grid_constant__ in, LoadArguments<Codec> load) {
  __shared__ __align__(16) Square<typename Codec::Stored> tile;
  const Batch<Codec>& batch = load.batch;
  const int64_t matrix = blockIdx.y, chunks = batch.chunks();
  OuterMatrix g = in.items[matrix];
  Finding found = {0, kNoDifference};
  if (threadIdx.x < chunks) found = batch.findings[matrix * chunks + threadIdx.x];
  const double largest = combine_threads(found.largest, larger);
  if (batch.n == batch.m) {
    const Turn own = turn_of(g, batch.n, combine_threads(found.first_difference, earlier));
    if (blockIdx.x == 0 && threadIdx.x == 0) batch.turns[matrix] = own;
    turn(g, own);
  }
  const int64_t across = tiles_of(batch.m), row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  read_tile(tile, g, load, row0, column0, largest);
  __syncthreads();
  const double sum = combine_threads(write_row(tile, batch, batch.x[0] + matrix * batch.x_size(), row0, column0), add);
  if (threadIdx.x == 0) batch.sums[matrix * gridDim.x + blockIdx.x] = sum;
}

// One thread block a matrix: its scale, 0 for a matrix of zeros.
template <typename S>
__global__ void __launch_bounds__(kThreads) newton_schulz_scale_kernel(const double* sums, int64_t tiles, S* scales) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) sum += sums[blockIdx.x * tiles + i];
  sum = combine_threads(sum, add);
  if (threadIdx.x == 0) scales[blockIdx.x] = sum == 0 ? S(0) : S(1 / sqrt(sum));
}

// ---- storing

template <typename Codec>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_store_kernel(const OuterMatrices __grid_constant__ out, Batch<Codec> batch,
                               const typename Codec::Stored* x) {
  using Stored = typename Codec::Stored;
  constexpr int kVector = kVectorBytes / int(sizeof(Stored));
  __shared__ __align__(16) Square<Stored> tile;
  OuterMatrix g = out.items[blockIdx.y];
  const Turn own = batch.n == batch.m ? batch.turns[blockIdx.y] : Turn::kNo;
  turn(g, own);
  x += blockIdx.y * batch.x_size();
  const int64_t across = tiles_of(batch.m), row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  if (own == Turn::kSymmetric) {  // what is below the diagonal comes from above
    for (int i = 0; i < kPerThread; ++i) {
      const Place at = place(i, true);
      const int64_t row = row0 + at.row, column = column0 + at.column;
      if (row >= batch.n || column >= batch.m) continue;
      tile.at[at.row][at.column] = row < column ? x[row * batch.x_stride + column] : x[column * batch.x_stride + row];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread / kVector; ++i) {
      const int index = i * kThreads + int(threadIdx.x);
      const int row = index / (kTile / kVector), column = index % (kTile / kVector) * kVector;
      if (row0 + row < batch.n && column0 + column < batch.m)
        store_16(&tile.at[row][column], load_16(x + (row0 + row) * batch.x_stride + column0 + column));
    }
  }
  __syncthreads();
  const bool by_rows = g.column <= g.row;
  with_codec(g.dtype, [&](auto codec) {
    using Outer = decltype(codec);
    auto* const to = static_cast<typename Outer::Stored*>(g.data);
    for (int i = 0; i < kPerThread; ++i) {
      const Place at = place(i, by_rows);
      const int64_t row = row0 + at.row, column = column0 + at.column;
      if (row < batch.n && column < batch.m)
        to[row * g.row + column * g.column] = encode<Outer>(Codec::decode(tile.at[at.row][at.column]));
    }
  });
}

// ---- the Gram form's elementwise step

template <typename Codec, typename S>
__global__ void __launch_bounds__(kThreads)
    newton_schulz_scale_square_kernel(const typename Codec::Stored* from, int64_t n, int64_t stride, S factor,
                                      S diagonal, typename Codec::Stored* to) {
  const int64_t begin = (int64_t(blockIdx.y) * n + blockIdx.x) * stride;  // a thread block takes a row
  for (int64_t j = threadIdx.x; j < n; j += kThreads)
    to[begin + j] = Codec::encode(fma(factor, Codec::decode(from[begin + j]), j == blockIdx.x ? diagonal : S(0)));
}

}  // namespace

template <typename Codec>
Status launch_normalize(const OuterMatrices& in, const Batch<Codec>& batch, DType dtype, cudaStream_t stream) {
  const unsigned count = unsigned(batch.count);
  Status status = status_of(launch(newton_schulz_inspect_kernel, dim3(unsigned(batch.chunks()), count), dim3(kThreads),
                                   0, stream, in, batch.n, batch.m, batch.findings));
  if (!status) return status;
  status = status_of(launch(newton_schulz_load_kernel<Codec>, dim3(unsigned(batch.tiles()), count), dim3(kThreads), 0,
                            stream, in, LoadArguments<Codec>{batch, dtype}));
  if (!status) return status;
  return status_of(launch(newton_schulz_scale_kernel<Scale<Codec>>, dim3(count), dim3(kThreads), 0, stream, batch.sums,
                          batch.tiles(), batch.scales));
}

template <typename Codec>
Status launch_store(const OuterMatrices& out, const Batch<Codec>& batch, const typename Codec::Stored* x,
                    cudaStream_t stream) {
  return status_of(launch(newton_schulz_store_kernel<Codec>, dim3(unsigned(batch.tiles()), unsigned(batch.count)),
                          dim3(kThreads), 0, stream, out, batch, x));
}

template <typename Codec>
Status launch_scale_square(const Batch<Codec>& batch, const typename Codec::Stored* from,
                           typename Batch<Codec>::S factor, typename Batch<Codec>::S diagonal,
                           typename Codec::Stored* to, cudaStream_t stream) {
  return status_of(launch(newton_schulz_scale_square_kernel<Codec, typename Batch<Codec>::S>,
                          dim3(unsigned(batch.n), unsigned(batch.count)), dim3(kThreads), 0, stream, from, batch.n,
                          batch.square_stride, factor, diagonal, to));
}

#define FUSEDOPT_INSTANTIATE(Codec)                                                                                \
  template Status launch_normalize(const OuterMatrices&, const Batch<Codec>&, DType, cudaStream_t);                \
  template Status launch_store(const OuterMatrices&, const Batch<Codec>&, const Codec::Stored*, cudaStream_t);     \
  template Status launch_scale_square(const Batch<Codec>&, const Codec::Stored*, Batch<Codec>::S, Batch<Codec>::S, \
                                      Codec::Stored*, cudaStream_t)
FUSEDOPT_INSTANTIATE(BFloat16);
FUSEDOPT_INSTANTIATE(Float16);
FUSEDOPT_INSTANTIATE(Float32);
FUSEDOPT_INSTANTIATE(Float64);
#undef FUSEDOPT_INSTANTIATE

}  // namespace fusedopt::cuda
