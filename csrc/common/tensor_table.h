// The tensor table: the one description of a list of tensors, validated and packed by the binding, read by every
// backend. A row is one tensor in all its roles (parameter, gradient, states); the roles are the algorithm's.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace fusedopt {

constexpr int kMaxRoles = 6;
constexpr int64_t kFlat = -1;  // layout of a row whose arrays all lie in memory in the same order, without gaps

struct TensorRow {
  void* data[kMaxRoles];  // nullptr: this row has no such role
  int64_t numel;          // at least 1: empty tensors get no row
  int64_t layout;         // kFlat, or where this row's strides begin in TensorTable::layouts
  int32_t scalars;        // index into the algorithm's array of per-tensor scalars
  DType dtype[kMaxRoles];
};

// Strides of one row, in elements: ndim, sizes[ndim], then strides[ndim] for each role in turn (zeros where absent).
// Dimensions are sorted so that the last is the parameter's fastest, and merged where every role allows it.
struct RowLayout {
  int64_t ndim;
  const int64_t* sizes;
  const int64_t* strides;

  explicit RowLayout(const int64_t* record) : ndim(record[0]), sizes(record + 1), strides(record + 1 + record[0]) {}
  const int64_t* strides_of(int role) const { return strides + role * ndim; }
};

struct TensorTable {
  const TensorRow* rows;
  const int64_t* starts;   // size + 1: elements before each row; the last is the total
  const int64_t* layouts;  // records as RowLayout reads them
  int64_t layouts_size;
  int64_t size;
  int roles;

  int64_t total() const { return starts[size]; }
};

}  // namespace fusedopt
