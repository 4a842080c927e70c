// Blockwise Adam on a GPU. Nothing here allocates or synchronises, so all of it can be captured in a CUDA graph; a
// graph replays the arrays' addresses and whatever numbers came from the host.
//
// The table travels by value. Blocks of one coordinate take AdamW's launches. The rest takes at most 13 launches and
// one more for every 130 regions in each of at most three passes (580 regions where neighbours are alike in all but
// addresses; of d strided dimensions, 4000 / (30 + 4 d)), and one for every 1000 shared blocks and 2000 copies.
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
