// Blockwise Adam on a GPU: the formula of math/blockwise_adam.h over a tensor table with blocks.
//
// One pass, 20 bytes per element in fp32, over whole blocks whose gradient waits in shared memory while its squares are
// added up, in double. Two passes, 24 bytes, for larger blocks, columns, blocks over several tensors, and tensors with
// strides: the sums of each tile; from them, in a fixed order, each block's second moment and rate; then the update.
// Blocks of one coordinate are AdamW's kernels. No division and no root per element: memory-bound.
#define FUSEDOPT_TARGET cuda
#include "cuda/blockwise_adam.h"
#include "cuda/blockwise_adam/launcher.h"

namespace fusedopt::cuda {

int64_t blockwise_adam_workspace_bytes(const TensorTable& table, int64_t options) {
  return Workspace(table, options).size * int64_t(sizeof(double));
}

Status launch_blockwise_adam(const TensorTable& table, const AdamWScalars<double>* scalars, BlockCopies copies,
                             void* workspace, cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;
  const Workspace places(table, 0);
  return Launcher(table, {scalars, nullptr}, places, workspace, stream).run(copies);
}

Status launch_blockwise_adam_capturable(const TensorTable& table, const AdamWDeviceOptions* options,
                                        int64_t options_size, const DeviceNumber* counters, int64_t counters_size,
                                        const AdamWLossScale& loss_scale, BlockCopies copies, void* workspace,
                                        cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;  // before any counter moves
  const Workspace places(table, options_size);
  auto* prepared = static_cast<PreparedScalars*>(workspace);
  const Status status =
      launch_prepare_scalars(options, options_size, counters, counters_size, loss_scale, prepared, stream);
  if (!status) return status;
  return Launcher(table, {nullptr, prepared}, places, workspace, stream).run(copies);
}

}  // namespace fusedopt::cuda
