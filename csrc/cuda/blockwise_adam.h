// Blockwise Adam on a GPU. Nothing here allocates or synchronises, so all of it can be captured in a CUDA graph; a
// graph replays the arrays' addresses and whatever numbers came from the host.
//
// The table travels by value: rows in at most 6 sorts of kernels beside AdamW's (for blocks of one coordinate), each
// launched once for every 140 regions of flat rows (400 where neighbours are alike in all but addresses), once for
// about 4000 / (30 + 5 ndim) of rows with strides; and one launch for every 1000 copies, shared blocks, and options.
#pragma once
#include "common/tensor_table.h"
#include "cuda/adam_scalars.h"

namespace fusedopt::cuda {

// What a tensor without a gradient holds of a block over several tensors: set to that block's new value, if any tensor
// of the table is part of it.
struct BlockCopy {
  float* value;
  int64_t shared;  // as in BlockRegion
};
struct BlockCopies {  // host memory
  const BlockCopy* data;
  int64_t size;
};

// options: entries of the capturable launch, 0 for the other one.
int64_t blockwise_adam_workspace_bytes(const TensorTable& table, int64_t options);

// One step over the table; row.scalars is an index into `scalars`, which is host memory.
//   workspace   device memory of blockwise_adam_workspace_bytes(table, 0) bytes, aligned to 8, untouched until the end
Status launch_blockwise_adam(const TensorTable& table, const AdamWScalars<double>* scalars, BlockCopies copies,
                             void* workspace, cudaStream_t stream);

// The same with numbers that stay on the device: arguments as in launch_adamw_capturable, but for the workspace's size,
// which is blockwise_adam_workspace_bytes(table, options_size).
Status launch_blockwise_adam_capturable(const TensorTable& table, const AdamWDeviceOptions* options,
                                        int64_t options_size, const DeviceNumber* counters, int64_t counters_size,
                                        const AdamWLossScale& loss_scale, BlockCopies copies, void* workspace,
                                        cudaStream_t stream);

}  // namespace fusedopt::cuda
