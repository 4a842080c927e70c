// Products in bfloat16 and float16 on tensor cores (mma.sync, sm_80 and later): out = alpha A B + beta C.
//
// Sums are fp32, rounded once at the end. A thread block makes a tile of 128 x 128 (64 x 64 where those would not fill
// the device) in steps of 32 along the depth K: operands come by cp.async through four stages of swizzled shared
// memory, fragments by ldmatrix. Per tile 2 * 128^2 K flops and 512 K bytes (64 flops per byte from L2), and 32 KiB
// written.
//
// A symmetric product has tiles on and below the diagonal only, 1/2 + 64/n of the whole's flops. A tile leaves through
// shared memory, as it is and, off the diagonal, transposed to its mirror place; on the diagonal what is above comes
// from what is below. So the result is symmetric bit for bit, and no bit depends on the size of the tile.
#define FUSEDOPT_TARGET cuda
#include "cuda/newton_schulz/product.cuh"
#include "cuda/newton_schulz/vectors.cuh"

namespace fusedopt::cuda {
namespace {

constexpr int kDepth = 32, kStages = 4;
constexpr int kChunkElements = 8;  // 16 bytes

// Thread blocks of large tiles that shared memory has room for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kResident = 1;
#else
constexpr int kResident = 2;
#endif

template <int kSide>
struct Shape {
  static constexpr int kThreads = kSide == 128 ? 256 : 128;
  static constexpr int kWarpsAcross = kSide == 128 ? 4 : 2;
  static constexpr int kWarpRows = kSide / 2, kWarpColumns = kSide / kWarpsAcross;
  static constexpr int kOperand = kSide * kDepth;  // elements of one stage
  static constexpr int kOutStride = kSide + kChunkElements;
  static constexpr size_t kSharedBytes = 2 * kStages * kOperand * sizeof(uint16_t);
  static_assert(kSide * kOutStride <= 2 * kStages * kOperand);
};

// Where a chunk of 16 bytes lies in a stage, in elements: eight rows' chunks of one column meet eight different groups
// of banks. Operands lie by rows of 32 along the depth; B of a full product by rows of kSide.
__device__ inline int by_depth(int row, int chunk) { return row * kDepth + (chunk ^ (row >> 1 & 3)) * kChunkElements; }
template <int kSide>
__device__ int by_columns(int k, int chunk) {
  return k * kSide + (chunk ^ (k & 7)) * kChunkElements;
}

// Copies a stage of an operand: `lines` of it from line0 on, kDepth or kSide elements each from element0 on.
template <int kSide, int kChunksAcross, typename Place>
__device__ void copy_operand(uint16_t* stage, const uint16_t* matrix, int64_t stride, int line0, int lines,
                             int element0, int elements, Place place) {
  constexpr int kChunks = Shape<kSide>::kOperand / kChunkElements, kThreads = Shape<kSide>::kThreads;
#pragma unroll
  for (int i = 0; i < kChunks / kThreads; ++i) {
    const int index = i * kThreads + int(threadIdx.x), line = index / kChunksAcross, chunk = index % kChunksAcross;
    const int at = element0 + chunk * kChunkElements, left = elements - at;
    const bool inside = line0 + line < lines && left > 0;
    const uint16_t* const from = matrix + (inside ? (line0 + line) * stride + at : 0);
    cp_async_16(stage + place(line, chunk), from, inside ? 2 * (left < kChunkElements ? left : kChunkElements) : 0);
  }
}

template <typename Codec>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (Codec::kDType == DType::kBFloat16)
    mma_m16n8k16_bf16(d, a, b);
  else
    mma_m16n8k16_f16(d, a, b);
}

template <typename Codec>
__device__ uint32_t pack(float low, float high) {
  return Codec::kDType == DType::kBFloat16 ? pack_bf16(low, high) : pack_f16(low, high);
}
template <typename Codec>
__device__ float unpack(uint16_t bits) {
  return Codec::kDType == DType::kBFloat16 ? bf16_to_float(bits) : unpack_f16(bits);
}

template <typename Codec, int kSide, bool kSymmetric>
struct Tile {
  using P = Product<Codec>;
  using Form = Shape<kSide>;
  static constexpr int kDown = Form::kWarpRows / 16, kAcross = Form::kWarpColumns / 8;  // fragments of a warp

  const P& p;
  uint16_t* const shared;
  const int row0, column0;  // the tile's
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Form::kWarpsAcross * Form::kWarpRows;
  const int warp_column = warp % Form::kWarpsAcross * Form::kWarpColumns;
  float sum[kDown][kAcross][4] = {};
  uint32_t rounded[kDown][kAcross][2];

  __device__ Tile(const P& product, uint16_t* memory, TilePlace place)
      : p(product), shared(memory), row0(place.row * kSide), column0(place.column * kSide) {}

  // Where in the tile this thread's results are.
  __device__ int row_of(int i, int half) const { return warp_row + 16 * i + 8 * half + lane / 4; }
  __device__ int column_of(int j) const { return warp_column + 8 * j + lane % 4 * 2; }

  __device__ uint16_t* a_stage(int step) const { return shared + step % kStages * 2 * Form::kOperand; }
  __device__ uint16_t* b_stage(int step) const { return a_stage(step) + Form::kOperand; }

  __device__ void copy(int step) const {
    const int k0 = step * kDepth;
    copy_operand<kSide, kDepth / kChunkElements>(a_stage(step), p.a, p.a_stride, row0, p.rows, k0, p.depth, by_depth);
    if constexpr (kSymmetric)
      copy_operand<kSide, kDepth / kChunkElements>(b_stage(step), p.b, p.b_stride, column0, p.columns, k0, p.depth,
                                                   by_depth);
    else
      copy_operand<kSide, kSide / kChunkElements>(b_stage(step), p.b, p.b_stride, k0, p.depth, column0, p.columns,
                                                  by_columns<kSide>);
  }

  __device__ void multiply(int step) {
    const uint16_t *const a = a_stage(step), *const b = b_stage(step);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[kDown][4], right[kAcross / 2][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        ldmatrix_x4(left[i], a + by_depth(warp_row + 16 * i + lane % 16, k / kChunkElements + lane / 16));
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        const int column = warp_column + 16 * j;
        if constexpr (kSymmetric)
          ldmatrix_x4(right[j], b + by_depth(column + lane / 16 * 8 + lane % 8, k / kChunkElements + lane / 8 % 2));
        else
          ldmatrix_x4_trans(right[j], b + by_columns<kSide>(k + lane % 16, column / kChunkElements + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          const uint32_t columns[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          mma<Codec>(sum[i][j], left[i], columns);
        }
    }
  }

  __device__ void accumulate() {
    const int steps = (p.depth + kDepth - 1) / kDepth;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step);
      cp_async_commit();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the step's operands are here, and the stage before them has been read
      if (step + kStages - 1 < steps) copy(step + kStages - 1);
      cp_async_commit();
      multiply(step);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  // alpha sum + beta C, rounded.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + row_of(i, half), column = column0 + column_of(j);
          float c0 = 0, c1 = 0;
          if (p.c && row < p.rows && column < p.columns) {
            const uint32_t two = *reinterpret_cast<const uint32_t*>(p.c + row * p.out_stride + column);
            c0 = p.beta * unpack<Codec>(uint16_t(two)), c1 = p.beta * unpack<Codec>(uint16_t(two >> 16));
          }
          rounded[i][j][half] =
              pack<Codec>(fma(p.alpha, sum[i][j][2 * half], c0), fma(p.alpha, sum[i][j][2 * half + 1], c1));
        }
  }

  // Writes the tile in shared memory to its place in the result, by 16 bytes.
  __device__ void store(int first_row, int first_column) const {
    constexpr int kChunksAcross = kSide / kChunkElements;
#pragma unroll
    for (int i = 0; i < kSide * kChunksAcross / Form::kThreads; ++i) {
      const int index = i * Form::kThreads + int(threadIdx.x);
      const int row = index / kChunksAcross, column = index % kChunksAcross * kChunkElements;
      if (first_row + row >= p.rows || first_column + column >= p.columns) continue;
      store_16(p.out + (first_row + row) * p.out_stride + first_column + column,
               load_16(shared + row * Form::kOutStride + column));
    }
  }

  // Calls body(row, column, results at column and column + 1) for this thread's part of the tile.
  template <typename Body>
  __device__ void for_pairs(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) body(row_of(i, half), column_of(j), rounded[i][j][half]);
  }
  __device__ void stage_direct() const {
    for_pairs([&](int row, int column, uint32_t two) {
      *reinterpret_cast<uint32_t*>(shared + row * Form::kOutStride + column) = two;
    });
  }
  __device__ void stage_mirrored() const {
    for_pairs([&](int row, int column, uint32_t two) {
      shared[column * Form::kOutStride + row] = uint16_t(two);
      shared[(column + 1) * Form::kOutStride + row] = uint16_t(two >> 16);
    });
  }
  __device__ void stage_lower_triangle() const {
    for_pairs([&](int row, int column, uint32_t two) {
      const auto put = [&](int at, uint16_t value) {
        if (row < at) return;
        shared[row * Form::kOutStride + at] = value;
        shared[at * Form::kOutStride + row] = value;
      };
      put(column, uint16_t(two));
      put(column + 1, uint16_t(two >> 16));
    });
  }

  __device__ void write() {
    finish();
    const bool on_diagonal = kSymmetric && row0 == column0;
    if (on_diagonal)
      stage_lower_triangle();
    else
      stage_direct();
    __syncthreads();
    store(row0, column0);
    if (!kSymmetric || on_diagonal) return;
    __syncthreads();
    stage_mirrored();
    __syncthreads();
    store(column0, row0);
  }
};

template <typename Codec, int kSide, bool kSymmetric>
__global__ void __launch_bounds__(Shape<kSide>::kThreads, kSide == 128 ? kResident : 4)
    tensor_product_kernel(Product<Codec> product) {
  DYNAMIC_SMEM(uint16_t, shared);
  select_matrix(product, blockIdx.y);
  Tile<Codec, kSide, kSymmetric> tile(product, shared,
                                      tile_place<kSymmetric>(blockIdx.x, product.rows, product.columns, kSide));
  tile.accumulate();
  tile.write();
}

template <typename Codec, int kSide, bool kSymmetric>
Status launch_tiles(const Product<Codec>& product, int64_t count, cudaStream_t stream) {
  const auto kernel = tensor_product_kernel<Codec, kSide, kSymmetric>;
  constexpr size_t kBytes = Shape<kSide>::kSharedBytes;
  const Status status =
      status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes)));
  if (!status) return status;
  return status_of(launch(kernel, product_grid(product, kSymmetric, kSide, count), dim3(Shape<kSide>::kThreads), kBytes,
                          stream, product));
}

template <typename Codec, int kSide>
Status launch_tiles(const Product<Codec>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  return symmetric ? launch_tiles<Codec, kSide, true>(product, count, stream)
                   : launch_tiles<Codec, kSide, false>(product, count, stream);
}

// Large tiles where there is one for every multiprocessor.
template <typename Codec>
Status launch_half(const Product<Codec>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  Status status = status_of(cudaGetDevice(&device));
  if (status) status = status_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (!status) return status;
  const dim3 grid = product_grid(product, symmetric, 128, count);
  return int64_t(grid.x) * grid.y >= multiprocessors ? launch_tiles<Codec, 128>(product, symmetric, count, stream)
                                                     : launch_tiles<Codec, 64>(product, symmetric, count, stream);
}

}  // namespace

Status launch_product(const Product<BFloat16>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  return launch_half(product, symmetric, count, stream);
}
Status launch_product(const Product<Float16>& product, bool symmetric, int64_t count, cudaStream_t stream) {
  return launch_half(product, symmetric, count, stream);
}

}  // namespace fusedopt::cuda
