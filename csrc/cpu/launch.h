// CPU launchers: split a table's elements into chunks and run a kernel on the pool.
#pragma once
#include "common/status.h"
#include "common/tensor_table.h"
#include "math/adamw.h"

namespace fusedopt::cpu {

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, int threads);

}  // namespace fusedopt::cpu
