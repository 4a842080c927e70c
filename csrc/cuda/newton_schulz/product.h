// The products of Newton–Schulz, for a whole batch in one launch.
#pragma once
#include <type_traits>

#include "common/status.h"
#include "cuda/stream.h"
#include "math/storage.h"

namespace fusedopt::cuda {

// What a matrix's scale is kept in: in float32 one rounding of it would be felt by all elements alike.
template <typename Codec>
using Scale = std::conditional_t<Codec::kDType == DType::kBFloat16 || Codec::kDType == DType::kFloat16, float, double>;

// out <- alpha A B + beta C, rounded once. All lie in the workspace, rows 16-byte aligned; what lies behind a row's end
// is not looked at. A is rows x depth. In symmetric products B is given by its transpose, which is columns x depth
// (that of a symmetric matrix is itself); the lower triangle of the result is computed and mirrored.
template <typename Codec>
struct Product {
  using Stored = typename Codec::Stored;
  using S = decltype(Codec::decode({}));

  const Stored *a, *b, *c;  // c: nullptr if beta is 0
  Stored* out;
  int64_t a_stride, b_stride, out_stride;  // from row to row; c has out's
  int64_t a_matrix, b_matrix, out_matrix;  // from matrix to matrix
  int32_t rows, columns, depth;
  S alpha, beta;
  const Scale<Codec>* scales;  // nullptr, or by matrix: alpha and beta are multiplied by this to the power of `power`
  int32_t power;
};

Status launch_product(const Product<BFloat16>& product, bool symmetric, int64_t count, cudaStream_t stream);
Status launch_product(const Product<Float16>& product, bool symmetric, int64_t count, cudaStream_t stream);
Status launch_product(const Product<Float32>& product, bool symmetric, int64_t count, cudaStream_t stream);
Status launch_product(const Product<Float64>& product, bool symmetric, int64_t count, cudaStream_t stream);

}  // namespace fusedopt::cuda
