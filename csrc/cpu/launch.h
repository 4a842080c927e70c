// CPU launchers: split a table's elements into chunks and run a kernel on the pool.
#pragma once
#include "common/status.h"
#include "common/tensor_table.h"
#include "math/adamw.h"

namespace fusedopt::cpu {

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, int threads);

// The table has blocks. The workspace is of this size, aligned for doubles; its content does not matter.
int64_t blockwise_adam_workspace_bytes(const TensorTable& table);
Status launch_blockwise_adam(const TensorTable& table, const AdamWScalars<double>* scalars, void* workspace,
                             int threads);

}  // namespace fusedopt::cpu
