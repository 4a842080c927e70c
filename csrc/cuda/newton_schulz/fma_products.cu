// Products in float32 and float64 by fma: out = alpha A B + beta C.
//
// A thread block makes a tile of 64 x 64, 8 x 8 a thread (8 x 4 in float64), in steps of 32 bytes along the depth K;
// while one step is multiplied in shared memory, the next is on its way to registers. Every sum runs along the depth in
// order. Per tile 2 * 64^2 K flops and 512 K bytes in float32 (16 flops per byte from L2).
//
// A symmetric product has tiles on and below the diagonal only, 1/2 + 32/n of the whole's flops; each thread writes its
// part as it is and transposed, on the diagonal only what is not above it. So the result is symmetric bit for bit.
#define FUSEDOPT_TARGET cuda
#include "cuda/newton_schulz/product.cuh"

namespace fusedopt::cuda {
namespace {

constexpr int kSide = 64;
constexpr int kPart = 4;  // a thread's rows: so many from the tile's upper half, and from the lower
template <typename S>
constexpr int kColumns = sizeof(S) == 8 ? kPart : 2 * kPart;  // of a thread, from one half or from both
template <typename S>
constexpr int kThreads = kSide * kSide / (2 * kPart * kColumns<S>);

// 16 bytes, as the machine loads and stores them.
template <typename S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / int(sizeof(S));
  S at[kSize];
};

template <typename S>
__device__ Vector<S> load(const S* from) {
  return *reinterpret_cast<const Vector<S>*>(from);
}
template <typename S>
__device__ void store(S* to, const Vector<S>& v) {
  *reinterpret_cast<Vector<S>*>(to) = v;
}

template <typename Codec, bool kSymmetric>
struct Tile {
  using P = Product<Codec>;
  using S = typename P::S;
  static constexpr int kVector = Vector<S>::kSize;
  static constexpr int kDepth = 32 / int(sizeof(S));
  static constexpr int kRows = 2 * kPart, kColumns = cuda::kColumns<S>, kThreads = cuda::kThreads<S>;
  static constexpr int kVectors = kSide * kDepth / kVector / kThreads;  // that a thread moves of an operand in a step
  struct Stage {
    S a[kDepth][kSide], b[kDepth][kSide];
  };

  const P& p;
  Stage* const stages;  // two
  const int row0, column0;
  const int thread = threadIdx.x;
  const int own_row = thread / (kSide / kColumns) * kPart, own_column = thread % (kSide / kColumns) * kPart;
  S sum[kRows][kColumns] = {};
  Vector<S> next_a[kVectors], next_b[kVectors];

  __device__ Tile(const P& product, Stage* memory, TilePlace place)
      : p(product), stages(memory), row0(place.row * kSide), column0(place.column * kSide) {}

  // Where this thread's v-th vector of an operand is: in operands by lines along the depth, and in B of a full product,
  // which lies by rows along the columns.
  __device__ int line_of(int v) const { return (v * kThreads + thread) % kSide; }
  __device__ int depth_of(int v) const { return (v * kThreads + thread) / kSide * kVector; }
  __device__ int row_of(int v) const { return (v * kThreads + thread) / (kSide / kVector); }
  __device__ int column_of(int v) const { return (v * kThreads + thread) % (kSide / kVector) * kVector; }

  // Zeros where the operand has ended.
  __device__ void fetch_lines(Vector<S> (&to)[kVectors], const S* matrix, int64_t stride, int line0, int lines,
                              int k0) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      to[v] = Vector<S>{};
      const int line = line0 + line_of(v), k = k0 + depth_of(v), left = p.depth - k;
      if (line >= lines || left <= 0) continue;
      to[v] = load(matrix + line * stride + k);
#pragma unroll
      for (int i = 1; i < kVector; ++i)
        if (i >= left) to[v].at[i] = 0;
    }
  }
  __device__ void fetch(int k0) {
    fetch_lines(next_a, p.a, p.a_stride, row0, p.rows, k0);
    if constexpr (kSymmetric) {
      fetch_lines(next_b, p.b, p.b_stride, column0, p.columns, k0);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int k = k0 + row_of(v), column = column0 + column_of(v);
        next_b[v] = k < p.depth && column < p.columns ? load(p.b + k * p.b_stride + column) : Vector<S>{};
      }
    }
  }
  __device__ void put(Stage& stage) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        stage.a[depth_of(v) + i][line_of(v)] = next_a[v].at[i];
        if constexpr (kSymmetric) stage.b[depth_of(v) + i][line_of(v)] = next_b[v].at[i];
      }
      if constexpr (!kSymmetric) store(&stage.b[row_of(v)][column_of(v)], next_b[v]);
    }
  }

  template <int kCount>
  __device__ static void read_parts(S (&to)[kCount], const S* line) {
#pragma unroll
    for (int half = 0; half < kCount / kPart; ++half)
#pragma unroll
      for (int v = 0; v < kPart / kVector; ++v) {
        const Vector<S> vector = load(line + half * kSide / 2 + v * kVector);
#pragma unroll
        for (int i = 0; i < kVector; ++i) to[half * kPart + v * kVector + i] = vector.at[i];
      }
  }
  __device__ void multiply(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      S a[kRows], b[kColumns];
      read_parts(a, &stage.a[k][own_row]);
      read_parts(b, &stage.b[k][own_column]);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = fma(a[i], b[j], sum[i][j]);
    }
  }

  __device__ void accumulate() {
    fetch(0);
    put(stages[0]);
    int stage = 0;
#pragma unroll 1
    for (int k0 = 0; k0 < p.depth; k0 += kDepth, stage ^= 1) {
      __syncthreads();  // this stage is complete, and the other one has been read
      const bool more = k0 + kDepth < p.depth;
      if (more) fetch(k0 + kDepth);
      multiply(stages[stage]);
      if (more) put(stages[stage ^ 1]);
    }
  }

  static __device__ int place(int i) { return i / kPart * (kSide / 2) + i % kPart; }
  __device__ int row_at(int i) const { return row0 + own_row + place(i); }
  __device__ int column_at(int j) const { return column0 + own_column + place(j); }

  // sum <- alpha sum + beta C.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += kVector) {
        const bool inside = p.c && row_at(i) < p.rows && column_at(j) < p.columns;
        const Vector<S> c = inside ? load(p.c + row_at(i) * p.out_stride + column_at(j)) : Vector<S>{};
#pragma unroll
        for (int l = 0; l < kVector; ++l) sum[i][j + l] = fma(p.alpha, sum[i][j + l], p.beta * c.at[l]);
      }
  }
  __device__ void store_direct() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; j += kVector) {
        if (row_at(i) >= p.rows || column_at(j) >= p.columns) continue;
        Vector<S> v;
#pragma unroll
        for (int l = 0; l < kVector; ++l) v.at[l] = sum[i][j + l];
        store(p.out + row_at(i) * p.out_stride + column_at(j), v);
      }
  }
  __device__ void store_mirrored() const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < kRows; i += kVector) {
        if (column_at(j) >= p.columns || row_at(i) >= p.rows) continue;
        Vector<S> v;
#pragma unroll
        for (int l = 0; l < kVector; ++l) v.at[l] = sum[i + l][j];
        store(p.out + column_at(j) * p.out_stride + row_at(i), v);
      }
  }
  __device__ void store_lower_triangle() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (row_at(i) < column_at(j) || row_at(i) >= p.rows) continue;
        p.out[row_at(i) * p.out_stride + column_at(j)] = sum[i][j];
        p.out[column_at(j) * p.out_stride + row_at(i)] = sum[i][j];
      }
  }

  __device__ void write() {
    finish();
    if (kSymmetric && row0 == column0) {
      store_lower_triangle();
    } else {
      store_direct();
      if (kSymmetric) store_mirrored();
    }
  }
};

template <typename Codec, bool kSymmetric>
__global__ void __launch_bounds__(kThreads<typename Product<Codec>::S>) fma_product_kernel(Product<Codec> product) {
  using T = Tile<Codec, kSymmetric>;
  __shared__ __align__(16) typename T::Stage stages[2];
  select_matrix(product, blockIdx.y);
  T tile(product, stages, tile_place<kSymmetric>(blockIdx.x, product.rows, product.columns, kSide));
  tile.accumulate();
  tile.write();
}

template <typename Codec>
Status launch_fma(const Product<Codec>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  const auto kernel = symmetric ? fma_product_kernel<Codec, true> : fma_product_kernel<Codec, false>;
  return status_of(launch(kernel, product_grid(product, symmetric, kSide, count),
                          dim3(kThreads<typename Product<Codec>::S>), 0, stream, product));
}

}  // namespace

Status launch_product(const Product<Float32>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  return launch_fma(product, symmetric, count, stream);
}
Status launch_product(const Product<Float64>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  return launch_fma(product, symmetric, count, stream);
}

}  // namespace fusedopt::cuda
