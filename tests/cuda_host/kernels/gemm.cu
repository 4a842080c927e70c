// C = A B on tensor cores: tiles of 32x32x32 through two stages of cp.async, ldmatrix, four warps.
// A is M x K, B is K x N, C is M x N, all row-major; K and N are multiples of 8, the rest is zeros.
#include <cstdint>

#include "cuda/launch.cuh"

namespace fusedopt::gemm_test {
namespace {

constexpr int kTile = 32, kStride = kTile + 8;  // rows 80 bytes apart meet different banks
using Tile = uint16_t[kTile][kStride];

// 128 threads copy 32 rows of 64 bytes; what lies outside the matrix becomes zero.
__device__ void load_tile(Tile& tile, const uint16_t* matrix, int rows, int columns, int row0, int column0) {
  const int r = threadIdx.x / 4, c = threadIdx.x % 4 * 8;
  const bool inside = row0 + r < rows && column0 + c < columns;
  const int64_t offset = inside ? int64_t(row0 + r) * columns + column0 + c : 0;
  cp_async_16(&tile[r][c], matrix + offset, inside ? 16 : 0);
}

template <bool kBFloat16>
__global__ void gemm_kernel(const uint16_t* __restrict__ a, const uint16_t* __restrict__ b, float* __restrict__ c,
                            int m, int n, int k) {
  __shared__ __align__(16) Tile a_tile[2], b_tile[2];
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;
  float sum[2][4] = {};

  const auto load = [&](int k0) {
    if (k0 < k) {
      load_tile(a_tile[k0 / kTile % 2], a, m, k, row0, k0);
      load_tile(b_tile[k0 / kTile % 2], b, k, n, k0, column0);
    }
    cp_async_commit();
  };
  load(0);
  for (int k0 = 0; k0 < k; k0 += kTile) {
    load(k0 + kTile);
    cp_async_wait<1>();
    __syncthreads();
    const Tile &at = a_tile[k0 / kTile % 2], &bt = b_tile[k0 / kTile % 2];
    for (int kk = 0; kk < kTile; kk += 16) {
      uint32_t af[4], bf[4];
      ldmatrix_x4(af, &at[warp_row + lane % 16][kk + lane / 16 * 8]);
      ldmatrix_x4_trans(bf, &bt[kk + lane % 16][warp_column + lane / 16 * 8]);
      for (int half = 0; half < 2; ++half) {
        const uint32_t columns[2] = {bf[2 * half], bf[2 * half + 1]};
        if (kBFloat16)
          mma_m16n8k16_bf16(sum[half], af, columns);
        else
          mma_m16n8k16_f16(sum[half], af, columns);
      }
    }
    __syncthreads();  // the next load overwrites these tiles
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp_row + lane / 4 + i / 2 * 8;
      const int column = column0 + warp_column + half * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[int64_t(row) * n + column] = sum[half][i];
    }
}

}  // namespace

extern "C" cudaError_t gemm(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k, int bfloat16,
                            cudaStream_t stream) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  return launch(bfloat16 ? gemm_kernel<true> : gemm_kernel<false>, grid, 128, 0, stream, a, b, c, m, n, k);
}

}  // namespace fusedopt::gemm_test
