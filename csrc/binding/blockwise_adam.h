#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_blockwise_adam(pybind11::module_& module);

}  // namespace fusedopt
