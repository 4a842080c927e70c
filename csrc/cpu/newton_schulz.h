// Newton–Schulz on the CPU: launchers.
#pragma once
#include "common/dtype.h"
#include "common/newton_schulz.h"
#include "common/status.h"

namespace fusedopt {

// One matrix and where its result goes, row-major. They may be the same array, and must not overlap otherwise; nor may
// the results of two matrices. Strides are elements from row to row, and from column to column.
struct NewtonSchulzMatrix {
  const void* in;
  void* out;
  int64_t rows, columns, in_stride, out_stride;
  DType in_dtype = DType::kFloat32, out_dtype = DType::kFloat32;
  int64_t in_column_stride = 1, out_column_stride = 1;
};

struct NewtonSchulzTask {
  const NewtonSchulzMatrix* matrix;
  const NewtonSchulzStep* steps;
  int64_t count;  // of steps
  bool gram;
  DType dtype;
};

namespace cpu {

// The workspace is of this size, aligned to 64 bytes; its content does not matter. Its size depends on the number of
// threads, the result does not.
int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix* matrices, int64_t count,
                                      const NewtonSchulzSchedule& schedule, int threads);
Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule,
                            void* workspace, int threads);

}  // namespace cpu
}  // namespace fusedopt
