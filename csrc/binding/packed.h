// A table and its scalars as NumPy arrays, for backends that are written in Python.
#pragma once
#include <pybind11/numpy.h>

#include <vector>

#include "common/tensor_table.h"
#include "cuda/device_number.h"
#include "math/adamw.h"
#include "math/storage.h"

namespace fusedopt {

namespace py = pybind11;

// One line a row: an address for each of kMaxRoles, numel, layout, scalars, a byte for each role's dtype.
py::array_t<int64_t> packed_rows(const TensorTable& table);
py::array_t<int64_t> packed_layouts(const TensorTable& table);
// One line a region: its row, then BlockRegion in order.
py::array_t<int64_t> packed_regions(const TensorTable& table);
// One line each: AdamWScalars in order, then a zero (nothing is to be skipped).
py::array_t<double> packed_scalars(const std::vector<AdamWScalars<double>>& scalars);

class PackedWords {  // doubles by their bits
 public:
  void add(int64_t word) { words_.push_back(word); }
  void add(double number) { words_.push_back(generic::bit_cast<int64_t>(number)); }
  void add(const cuda::DeviceNumber& number) {
    add(int64_t(reinterpret_cast<uintptr_t>(number.data)));
    add(int64_t(number.dtype));
  }
  py::array_t<int64_t> array() const { return py::array_t<int64_t>(int64_t(words_.size()), words_.data()); }

 private:
  std::vector<int64_t> words_;
};

}  // namespace fusedopt
