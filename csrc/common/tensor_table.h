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

// Blocks of coordinates that share one value (a second moment). A region is a matrix within the tensor's elements in
// row-major order; a block is `group` consecutive columns of it in all its rows, the last one may be narrower.
struct BlockRegion {
  int64_t offset, rows, columns, stride, group;  // stride: elements between rows
  int64_t first_block;                           // blocks are numbered region by region
  int64_t shared;  // kOwnBlocks, or the number of the block that regions of several tensors are parts of together

  int64_t blocks() const { return (columns + group - 1) / group; }
  int64_t numel() const { return rows * columns; }
  int64_t numel_of(int64_t block) const {
    const int64_t left = columns - block * group;
    return rows * (left < group ? left : group);
  }
};
constexpr int64_t kOwnBlocks = -1;

struct RowBlocks {     // one row's column of blocks
  int64_t begin, end;  // its regions in TensorTable::regions; they tile the tensor
  int64_t count;       // of blocks
};

struct TensorTable {
  const TensorRow* rows;
  const int64_t* starts;   // size + 1: elements before each row; the last is the total
  const int64_t* layouts;  // records as RowLayout reads them
  int64_t layouts_size;
  int64_t size;
  int roles;
  // Where rows have blocks, the last role holds one value per block, in order. Flat then means row-major, since that is
  // what blocks are defined on, and the dimensions of layouts are in row-major order.
  const RowBlocks* blocks = nullptr;
  const BlockRegion* regions = nullptr;

  int64_t total() const { return starts[size]; }
  bool per_block(int role) const { return blocks && role == roles - 1; }
};

}  // namespace fusedopt
