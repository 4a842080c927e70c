// Launching on a GPU from Python: the device is made current, the GIL released, the status turned into an exception.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/device.h"

namespace fusedopt {

namespace py = pybind11;

constexpr bool kWithCuda = FUSEDOPT_WITH_CUDA;

// "the launch on cuda:1 (sm_75): no kernel image is available...; built for sm_80 ...".
std::string gpu_error(int device, const char* error);

template <typename Launch>
void launch_on_gpu(int device, Launch launch) {
  Status status = {"built without CUDA kernels"};
  if constexpr (kWithCuda) {
    const py::gil_scoped_release release;
    const cuda::DeviceGuard guard(device);
    status = guard.status();
    if (status) status = launch();
  }
  if (!status) throw std::runtime_error(gpu_error(device, status.error));
}

}  // namespace fusedopt
