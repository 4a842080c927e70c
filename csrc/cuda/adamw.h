// AdamW on a GPU. Nothing here allocates or synchronises, so all of it can be captured in a CUDA graph; a graph replays
// the arrays' addresses and whatever numbers came from the host.
//
// Tensors of one mix of dtypes take a launch for every 700, also where each has its lr, weight_decay or step. Fewer fit
// - where each has its own numbers from the host in float64 (580, with maxima 520), or its own step and maxima (650),
// - where strides, or mixes of dtypes without a kernel of their own, differ from the tensor before (170 of two axes).
// Numbers on the device take a launch more, see adam_scalars.h: thread blocks that computed their scalars themselves
// would keep memory waiting.
#pragma once
#include "common/tensor_table.h"
#include "cuda/adam_scalars.h"

namespace fusedopt::cuda {

// One step over the table; row.scalars is an index into `scalars`, which is host memory.
Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, cudaStream_t stream);

struct ScalarsSource;  // adam_scalars.cuh
// The same for kernels that build on this one, with scalars from either side.
Status launch_adamw(const TensorTable& table, const ScalarsSource& source, cudaStream_t stream);

int64_t adamw_workspace_bytes(int64_t options_size);

// The same with numbers that stay on the device ("capturable"): adds one to each counter, then takes the step that it
// counts. If found_inf holds anything but 0, counters and arrays stay as they are.
//   options     host memory, options_size of them; row.scalars is an index into them
//   counters    host memory, each counter once, however many options name it
//   workspace   device memory of adamw_workspace_bytes(options_size) bytes, aligned to 8, untouched until the end
Status launch_adamw_capturable(const TensorTable& table, const AdamWDeviceOptions* options, int64_t options_size,
                               const DeviceNumber* counters, int64_t counters_size, const AdamWLossScale& loss_scale,
                               void* workspace, cudaStream_t stream);

}  // namespace fusedopt::cuda
