#include "binding/packed.h"

namespace fusedopt {

py::array_t<int64_t> packed_rows(const TensorTable& table) {
  py::array_t<int64_t> packed({table.size, int64_t(kMaxRoles + 4)});
  int64_t* to = packed.mutable_data();
  for (const TensorRow* row = table.rows; row < table.rows + table.size; ++row) {
    uint64_t dtypes = 0;
    for (int role = 0; role < kMaxRoles; ++role) {
      *to++ = int64_t(reinterpret_cast<uintptr_t>(row->data[role]));
      dtypes |= uint64_t(row->dtype[role]) << 8 * role;
    }
    for (const int64_t word : {row->numel, row->layout, int64_t(row->scalars), int64_t(dtypes)}) *to++ = word;
  }
  return packed;
}

py::array_t<int64_t> packed_layouts(const TensorTable& table) {
  return py::array_t<int64_t>(table.layouts_size, table.layouts);
}

py::array_t<int64_t> packed_regions(const TensorTable& table) {
  py::array_t<int64_t> packed({table.size ? table.blocks[table.size - 1].end : 0, int64_t(8)});
  int64_t* to = packed.mutable_data();
  for (int64_t row = 0; row < table.size; ++row)
    for (int64_t i = table.blocks[row].begin; i < table.blocks[row].end; ++i) {
      const BlockRegion& r = table.regions[i];
      for (const int64_t word : {row, r.offset, r.rows, r.columns, r.stride, r.group, r.first_block, r.shared})
        *to++ = word;
    }
  return packed;
}

py::array_t<double> packed_scalars(const std::vector<AdamWScalars<double>>& scalars) {
  py::array_t<double> packed({int64_t(scalars.size()), int64_t(10)});
  double* to = packed.mutable_data();
  for (const AdamWScalars<double>& k : scalars)
    for (const double number : {k.lerp_weight, k.beta2, k.eps, k.grad_weight, k.decay, k.rate, k.inv_sqrt_c2,
                                k.grad_factor, double(k.lerp_from_grad), 0.0})
      *to++ = number;
  return packed;
}

}  // namespace fusedopt
