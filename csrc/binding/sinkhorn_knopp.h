#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_sinkhorn_knopp(pybind11::module_& module);

}  // namespace fusedopt
