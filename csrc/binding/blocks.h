// Blocks of coordinates: from a partition, a Python object, to the regions of the tensor table.
#pragma once
#include <string>
#include <vector>

#include "binding/arrays.h"
#include "common/tensor_table.h"

namespace fusedopt {

struct Blocks {  // of one tensor, defined on its row-major order; regions have no shared block yet
  std::vector<BlockRegion> regions;
  int64_t count = 0;
  bool global = false;  // one block over all tensors of a list or group
};

// The same blocks in terms of memory, for a tensor whose elements lie there without gaps, its axes in this order (the
// one with the widest stride first; axes of one element left out). False: they are no regions of that order.
bool in_memory_order(const Blocks& blocks, const int64_t* shape, const std::vector<int32_t>& axes,
                     std::vector<BlockRegion>* regions);

bool is_global(PyObject* partition);

// From what fusedopt.partitions.resolve returned.
Blocks blocks_of(py::handle partition, const py::object& regions);

}  // namespace fusedopt
