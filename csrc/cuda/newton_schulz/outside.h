// Between the caller's matrices and the workspace: O(n m) beside the products' O(n^2 m).
#pragma once
#include "common/status.h"
#include "cuda/newton_schulz/batch.h"
#include "cuda/stream.h"

namespace fusedopt::cuda {

// Reads the batch into x[0], scaled by a power of two and rounded to dtype, and finds its scales and turns.
template <typename Codec>
Status launch_normalize(const OuterMatrices& in, const Batch<Codec>& batch, DType dtype, cudaStream_t stream);

// Writes x to the caller's matrices.
template <typename Codec>
Status launch_store(const OuterMatrices& out, const Batch<Codec>& batch, const typename Codec::Stored* x,
                    cudaStream_t stream);

// to <- factor * from + diagonal * I, of the batch's n x n matrices.
template <typename Codec>
Status launch_scale_square(const Batch<Codec>& batch, const typename Codec::Stored* from,
                           typename Batch<Codec>::S factor, typename Batch<Codec>::S diagonal,
                           typename Codec::Stored* to, cudaStream_t stream);

}  // namespace fusedopt::cuda
