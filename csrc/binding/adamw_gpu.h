// AdamW's rows on one GPU: their table, their numbers as kernels take them, and the launch.
#pragma once
#include "binding/table.h"
#include "cuda/adamw.h"

namespace fusedopt {

class AdamWGpuRows {
 public:
  AdamWGpuRows(dlpack::Device device, unsigned writes) : device(device), table(AdamWRole::kCount, writes) { clear(); }

  void clear();
  bool used() const { return !options_.empty() || !counters_.empty(); }
  // The index of these among the rows' options. Neighbours mostly share them.
  int32_t index_of(const cuda::AdamWDeviceOptions& options);
  void add_counter(cuda::DeviceNumber counter) { counters_.push_back(counter); }

  // What the launch needs beside its arrays; nothing where all numbers come from the host.
  int64_t workspace_bytes(const cuda::AdamWLossScale& loss_scale) const;
  // Throws RuntimeError naming the device and what was built for if the launch fails.
  void launch(const cuda::AdamWLossScale& loss_scale, void* workspace, cudaStream_t stream) const;
  // For a launch from Python: (rows, layouts, scalars) where all numbers come from the host, else (rows, layouts,
  // options, counters, loss scale) in the words of triton_kernels/adamw.py.
  py::tuple packed(const cuda::AdamWLossScale& loss_scale) const;

  const dlpack::Device device;
  TableBuilder table;
  PyObject* first = nullptr;  // the first row's parameter, borrowed: its library knows the current stream

 private:
  bool reads_device(const cuda::AdamWLossScale& loss_scale) const;
  std::vector<AdamWScalars<double>> host_scalars(const cuda::AdamWLossScale& loss_scale) const;

  std::vector<cuda::AdamWDeviceOptions> options_;
  std::vector<cuda::DeviceNumber> counters_;
};

}  // namespace fusedopt
