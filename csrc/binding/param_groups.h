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

// Remembers where a walk's objects lay and has them fetched into the cache a few rows ahead of the next walk. Thousands
// of parameters' objects do not survive a step in the cache, and following their pointers one miss after another would
// cost more than the update. Addresses are only prefetched, never read: what has moved meanwhile costs nothing but
// time.
class Trail {
 public:
  void rewind() {
    end_ = next_;
    next_ = 0;
  }
  // The next row begins.
  void advance() {
    if (next_ + kAhead < end_)
      for (const void* address : rows_[next_ + kAhead].addresses) __builtin_prefetch(address);
    if (next_ == rows_.size()) rows_.emplace_back();
    row_ = &rows_[next_++];
    used_ = 0;
  }
  void visit(const void* address) {
    if (used_ < kAddresses) row_->addresses[used_++] = address;
  }
  // A tensor and the cache lines around its shape, which torch keeps within its own object.
  void visit_tensor(const void* object, const int64_t* shape) {
    const char* line = reinterpret_cast<const char*>(shape);
    visit(object);
    visit(line - 64);
    visit(line);
    visit(line + 64);
  }

 private:
  static constexpr size_t kAhead = 12;
  static constexpr int kAddresses = 24;
  struct Row {
    const void* addresses[kAddresses] = {};
  };

  std::vector<Row> rows_;
  Row* row_ = nullptr;
  size_t next_ = 0, end_ = 0;
  int used_ = 0;
};

}  // namespace fusedopt
