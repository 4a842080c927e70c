// The extension module: what it was built with, which instruction set runs, and one bind_* per algorithm.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/adam_plan.h"
#include "binding/adamw.h"
#include "binding/arrays.h"
#include "binding/blockwise_adam.h"
#include "binding/gpu.h"
#include "binding/muon.h"
#include "binding/newton_schulz.h"
#include "binding/sinkhorn_knopp.h"
#include "binding/sinkhorn_newton_sparse.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

void set_isa(const std::string& name) {
  if (!fusedopt::select_isa(name.c_str()))
    throw py::value_error("FUSEDOPT_ISA is '" + name +
                          "', expected avx512, avx2 or portable, and one that this CPU has");
}

py::list available_isas() {
  py::list names;
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "portable"})
    if (fusedopt::isa_available(name)) names.append(name);
  return names;
}

// (each device's architecture, runtime version, why there is no device).
py::tuple cuda_devices() {
  std::vector<int> architectures;
  int version = 0;
  const char* error = "built without CUDA kernels (" FUSEDOPT_CUDA_DECISION ")";
  if constexpr (fusedopt::kWithCuda) {
    const int count = fusedopt::cuda::device_count(&error);
    for (int device = 0; device < count; ++device) architectures.push_back(fusedopt::cuda::architecture(device));
    version = fusedopt::cuda::runtime_version();
    if (!error) error = count ? "" : "no CUDA device here";
  }
  return py::make_tuple(architectures, version, error);
}

// (DLPack device type, device id) of an array of any library.
py::tuple device_of(const py::object& array, const char* name) {
  static auto* reader = new fusedopt::ArrayReader;  // never destroyed: what it holds must not outlive Python
  fusedopt::ArrayView view;
  reader->read(array.ptr(), {name, -1, ""}, &view);
  reader->clear();
  return py::make_tuple(view.device.type, view.device.id);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fusedopt's kernels; use them through the package.";
  module.attr("__version__") = FUSEDOPT_VERSION;
  module.attr("built_with_cuda") = bool(FUSEDOPT_WITH_CUDA);
  module.attr("cuda_decision") = FUSEDOPT_CUDA_DECISION;
  module.attr("cuda_archs") = FUSEDOPT_CUDA_ARCHS;
  module.def("cuda_devices", &cuda_devices);
  module.def("device_of", &device_of, py::arg("array"), py::arg("name"));
  module.def("isa", &fusedopt::isa);
  module.def("available_isas", &available_isas);
  module.def("set_isa", &set_isa, py::arg("name"));
  fusedopt::bind_adam_plan(module);
  fusedopt::bind_adamw(module);
  fusedopt::bind_blockwise_adam(module);
  fusedopt::bind_muon(module);
  fusedopt::bind_newton_schulz(module);
  fusedopt::bind_sinkhorn_knopp(module);
  fusedopt::bind_sinkhorn_newton_sparse(module);
}
