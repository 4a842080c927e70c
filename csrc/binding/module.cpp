// The extension module: what it was built with, which instruction set runs, and one bind_* per algorithm.
#include <pybind11/pybind11.h>

#include "binding/adamw.h"
#include "cpu/isa.h"
#if FUSEDOPT_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

void set_isa(const std::string& name) {
  if (!fusedopt::select_isa(name.c_str()))
    throw py::value_error("FUSEDOPT_ISA is '" + name +
                          "', expected avx512, avx2 or portable, and one that this CPU has");
}

py::list available_isas() {
  py::list names;
  for (const char* name : {"avx512", "avx2", "portable"})
    if (fusedopt::isa_available(name)) names.append(name);
  return names;
}

// (devices, runtime version, why there is no device).
py::tuple cuda_devices() {
#if FUSEDOPT_WITH_CUDA
  const char* error = nullptr;
  const int count = fusedopt::cuda::device_count(&error);
  return py::make_tuple(count, fusedopt::cuda::runtime_version(), error ? error : "");
#else
  return py::make_tuple(0, 0, "built without CUDA kernels (" FUSEDOPT_CUDA_DECISION ")");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fusedopt's kernels; use them through the package.";
  module.attr("__version__") = FUSEDOPT_VERSION;
  module.attr("built_with_cuda") = bool(FUSEDOPT_WITH_CUDA);
  module.attr("cuda_decision") = FUSEDOPT_CUDA_DECISION;
  module.attr("cuda_archs") = FUSEDOPT_CUDA_ARCHS;
  module.def("cuda_devices", &cuda_devices);
  module.def("isa", &fusedopt::isa);
  module.def("available_isas", &available_isas);
  module.def("set_isa", &set_isa, py::arg("name"));
  fusedopt::bind_adamw(module);
}
