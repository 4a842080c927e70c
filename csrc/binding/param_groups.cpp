#include "binding/param_groups.h"

namespace fusedopt {

void GradReader::look_up(PyTypeObject* type) {
  type_ = type;
  getter_ = nullptr;
  // Found on the class (not on the instance): a property or a getter defined in C. Only the latter can be called
  // directly, and only if no subclass put something else in its place, which the look-up along the bases settles.
  const py::object attribute = py::getattr(reinterpret_cast<PyObject*>(type), "grad", py::none());
  if (Py_IS_TYPE(attribute.ptr(), &PyGetSetDescr_Type))
    getter_ = reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset;
}

}  // namespace fusedopt
