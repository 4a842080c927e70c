// Newton–Schulz as data: what every backend executes. The list is made in one place,
// python/fusedopt/_newton_schulz_schedule.py.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace fusedopt {

// X <- aX + b(XX')X + c(XX')(XX')X. In the Gram form, restart_before says that X itself is computed first, and its Gram
// matrix anew.
struct NewtonSchulzStep {
  double a, b, c;
  bool restart_before;
};

struct NewtonSchulzSchedule {
  std::vector<NewtonSchulzStep> steps;
  double gram_from;  // matrices whose long side is at least this many times the short one iterate on the Gram matrix;
                     // 0: all, infinity: none
  DType dtype;       // each matrix is rounded to it first, scaled by a power of two
  DType arithmetic = dtype;  // what products read and write; a CPU that does not multiply it computes in float32

  bool gram(int64_t rows, int64_t columns) const {
    const int64_t shorter = rows < columns ? rows : columns, longer = rows < columns ? columns : rows;
    return double(longer) >= gram_from * double(shorter);
  }
};

// One matrix and where its result goes, row-major. They may be the same array, and must not overlap otherwise; nor may
// the results of two matrices. Strides are elements from row to row, and from column to column.
struct NewtonSchulzMatrix {
  const void* in;
  void* out;
  int64_t rows, columns, in_stride, out_stride;
  DType in_dtype = DType::kFloat32, out_dtype = DType::kFloat32;
  int64_t in_column_stride = 1, out_column_stride = 1;
};

}  // namespace fusedopt
