#include "binding/blocks.h"

#include <algorithm>

namespace fusedopt {
namespace {

// One form for what is the same: a run has one row, a dense matrix that is a single block is a run.
BlockRegion simplest(BlockRegion r) {
  r.group = std::min(r.group, r.columns);
  if (r.rows > 1 && r.columns == r.stride && r.group == r.columns) r.columns = r.group = r.rows * r.columns, r.rows = 1;
  if (r.rows == 1) r.stride = r.columns;
  return r;
}

void number(std::vector<BlockRegion>& regions) {
  int64_t first = 0;
  for (BlockRegion& region : regions) {
    region.first_block = first;
    region.shared = kOwnBlocks;
    first += region.blocks();
  }
}

// A factor of the tensor's row-major shape: an axis, or the outer or inner part of the one that a block's edge splits.
struct Factor {
  int64_t size;
  int32_t axis;
  bool picks_block;  // else: moves within the block
};

// A region's columns as factors: the leading ones pick the block, the others make up `group`. Empty: they don't factor.
std::vector<Factor> factors_of(const BlockRegion& region, const int64_t* shape, int32_t axis, int32_t ndim) {
  std::vector<Factor> factors;
  for (int64_t left = region.columns / region.group; axis < ndim; ++axis) {
    const int64_t size = shape[axis];
    if (left == 1 || left % size == 0) {
      factors.push_back({size, axis, left > 1});
      left = left > 1 ? left / size : 1;
    } else if (size % left == 0) {
      factors.push_back({left, axis, true});
      factors.push_back({size / left, axis, false});
      left = 1;
    } else {
      return {};
    }
  }
  return factors;
}

// The region of memory in which one run of factors picks the block, if it is one run and in order.
bool arranged(const std::vector<Factor>& factors, const std::vector<int32_t>& axes, BlockRegion* region) {
  std::vector<Factor> in_memory;
  for (const int32_t axis : axes)
    for (const Factor& factor : factors)
      if (factor.axis == axis && factor.size > 1) in_memory.push_back(factor);
  int64_t before = 1, picking = 1, after = 1;
  int32_t last_axis = -1;
  for (const Factor& factor : in_memory) {
    if (!factor.picks_block) {
      (picking == 1 ? before : after) *= factor.size;
      continue;
    }
    if (after > 1 || factor.axis < last_axis) return false;
    picking *= factor.size;
    last_axis = factor.axis;
  }
  if (picking == 1) std::swap(before, after);  // one block
  *region = {0, before, picking * after, picking * after, after, 0, kOwnBlocks};
  return true;
}

bool region_in_memory(const BlockRegion& region, const int64_t* shape, const std::vector<int32_t>& axes, int64_t numel,
                      BlockRegion* result) {
  const int32_t ndim = 1 + *std::max_element(axes.begin(), axes.end());
  if (region.columns % region.group != 0) return false;
  if (region.numel() == numel) {  // all of the tensor
    std::vector<Factor> factors;
    int32_t axis = 0;
    for (int64_t left = region.rows; left > 1; left /= shape[axis++]) {
      if (left % shape[axis] != 0) return false;
      factors.push_back({shape[axis], axis, false});
    }
    const std::vector<Factor> columns = factors_of(region, shape, axis, ndim);
    if (columns.empty()) return false;
    factors.insert(factors.end(), columns.begin(), columns.end());
    return arranged(factors, axes, result);
  }
  // A slice of axis 0, in equal runs of its rows.
  const int64_t row = numel / shape[0];
  if (region.rows != 1 || region.offset % row || region.columns % row || region.group % row) return false;
  int64_t before = 1, after = 1;
  bool passed = false;
  for (const int32_t axis : axes)
    if (axis == 0)
      passed = true;
    else
      (passed ? after : before) *= shape[axis];
  *result = {region.offset / row * after,
             before,
             region.columns / row * after,
             shape[0] * after,
             region.group / row * after,
             0,
             kOwnBlocks};
  return passed;
}

}  // namespace

bool in_memory_order(const Blocks& blocks, const int64_t* shape, const std::vector<int32_t>& axes,
                     std::vector<BlockRegion>* regions) {
  if (axes.empty()) return false;
  int64_t numel = 1;
  for (const int32_t axis : axes) numel *= shape[axis];
  regions->clear();
  for (const BlockRegion& region : blocks.regions) {
    BlockRegion& in_memory = regions->emplace_back();
    if (!region_in_memory(region, shape, axes, numel, &in_memory)) return false;
    in_memory = simplest(in_memory);
  }
  number(*regions);
  return true;
}

bool is_global(PyObject* partition) {
  return PyUnicode_Check(partition) && PyUnicode_CompareWithASCIIString(partition, "global") == 0;
}

Blocks blocks_of(py::handle partition, const py::object& regions) {
  Blocks blocks;
  blocks.global = is_global(partition.ptr());
  for (const py::handle entry : regions) {
    const auto region = py::reinterpret_borrow<py::sequence>(entry);
    blocks.regions.push_back(simplest({region[0].cast<int64_t>(), region[1].cast<int64_t>(), region[2].cast<int64_t>(),
                                       region[3].cast<int64_t>(), region[4].cast<int64_t>(), 0, kOwnBlocks}));
  }
  number(blocks.regions);
  for (const BlockRegion& region : blocks.regions) blocks.count += region.blocks();
  return blocks;
}

}  // namespace fusedopt
