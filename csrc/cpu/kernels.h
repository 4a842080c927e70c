// What every instruction set offers, as a table of functions; cpu/isa.h picks one table at run time.
#pragma once
#include "common/status.h"
#include "common/tensor_table.h"
#include "math/adamw.h"

namespace fusedopt {

struct CpuKernels {
  // Updates elements [begin, end) of the table, counted over all its rows; scalars are indexed by TensorRow::scalars.
  void (*adamw)(const TensorTable& table, const AdamWScalars<double>* scalars, int64_t begin, int64_t end);
};

namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace portable {
extern const CpuKernels kernels;
}

}  // namespace fusedopt
