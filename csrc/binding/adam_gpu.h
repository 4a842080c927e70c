// The rows of one plan on one GPU: their table, their numbers as kernels take them, and what its launches share.
#pragma once
#include "binding/table.h"
#include "cuda/adamw.h"

namespace fusedopt {

class AdamGpuRows {
 public:
  AdamGpuRows(dlpack::Device device, const TableBuilder& empty) : device(device), table(empty) { clear(); }

  void clear();
  bool used() const { return first || !counters_.empty(); }
  // The index of these among the rows' options. Neighbours mostly share them.
  int32_t index_of(const cuda::AdamWDeviceOptions& options);
  void add_counter(cuda::DeviceNumber counter) { counters_.push_back(counter); }

  // Whether some of the launch's numbers lie on the device.
  bool reads_device(const cuda::AdamWLossScale& loss_scale) const;
  const std::vector<cuda::AdamWDeviceOptions>& options() const { return options_; }
  const std::vector<cuda::DeviceNumber>& counters() const { return counters_; }
  // Where all numbers come from the host.
  std::vector<AdamWScalars<double>> host_scalars(const cuda::AdamWLossScale& loss_scale) const;
  // Throws if a launch that needs memory beside its arrays got none.
  void check_workspace(const void* workspace) const;
  // For a launch from Python: (rows, layouts, scalars) where all numbers come from the host, else (rows, layouts,
  // options, counters, loss scale) in the words of triton_kernels/_adam.py.
  py::tuple packed(const cuda::AdamWLossScale& loss_scale) const;

  const dlpack::Device device;
  TableBuilder table;
  PyObject* first = nullptr;  // the first row's parameter, borrowed: its library knows the current stream

 private:
  std::vector<cuda::AdamWDeviceOptions> options_;
  std::vector<cuda::DeviceNumber> counters_;
};

}  // namespace fusedopt
