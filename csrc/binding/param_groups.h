// Walks a torch optimizer's own structures, without building Python lists: for 5000 small tensors the lists would cost
// more than the update. Used by every optimizer class; the functional steps take lists instead.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fusedopt {

namespace py = pybind11;

// `tensor.grad` through the getter that the type inherits, found once per type.
class GradReader {
 public:
  // A new reference, None included; throws what the getter raises.
  py::object operator()(PyObject* tensor) {
    if (Py_TYPE(tensor) != type_) look_up(Py_TYPE(tensor));
    PyObject* grad = getter_ ? getter_->get(tensor, getter_->closure) : PyObject_GetAttrString(tensor, "grad");
    if (!grad) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

 private:
  void look_up(PyTypeObject* type);

  PyTypeObject* type_ = nullptr;
  PyGetSetDef* getter_ = nullptr;  // nullptr: the type has an attribute of another kind
};

// Finds entries of a dict that is asked for its keys in the order they were put in: by stepping along, without hashing
// (a tensor's hash is a Python function). Keys asked for in another order are looked up.
class DictCursor {
 public:
  explicit DictCursor(PyObject* dict) : dict_(dict) { advance(); }

  // Borrowed; nullptr if there is no such key.
  PyObject* find(PyObject* key) {
    if (key == key_) {
      PyObject* value = value_;
      advance();
      return value;
    }
    PyObject* value = PyDict_GetItemWithError(dict_, key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  void advance() {
    if (!PyDict_Next(dict_, &position_, &key_, &value_)) key_ = value_ = nullptr;
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
};

}  // namespace fusedopt
