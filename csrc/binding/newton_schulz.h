#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

// _C.NewtonSchulzSchedule is a NewtonSchulzSchedule: what other algorithms take too.
void bind_newton_schulz(pybind11::module_& module);

}  // namespace fusedopt
