// Partitions, Python objects, in the terms of kernels: asked for once for every place in a walk, as long as partition
// and shape stay.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "binding/arrays.h"

namespace fusedopt {

template <typename Result>
class Resolver {
 public:
  // resolve(partition, shape) returns a sequence; make(partition, that) what kernels need.
  Resolver(py::object resolve, Result (*make)(py::handle partition, const py::object& resolved))
      : resolve_(std::move(resolve)), make_(make) {}

  void rewind() { next_ = 0; }
  // Throws what resolve raises, with the parameter's name before it. The result is valid until the next call.
  const Result& next(PyObject* partition, const ArrayView& param, const ArgName& name) {
    const size_t at = next_++;
    if (at < places_.size() && fits(places_[at], partition, param)) return places_[at].result;
    if (at > 0 && fits(places_[at - 1], partition, param)) {  // lists are full of tensors of one kind
      const Place same = places_[at - 1];
      if (at == places_.size()) places_.emplace_back();
      places_[at] = same;
      return places_[at].result;
    }
    Place place = look_up(partition, param, name);
    if (at == places_.size()) places_.emplace_back();
    places_[at] = std::move(place);
    return places_[at].result;
  }

 private:
  struct Place {
    py::object partition;
    std::vector<int64_t> shape;
    Result result;
  };

  static bool fits(const Place& place, PyObject* partition, const ArrayView& param) {
    if (!std::equal(place.shape.begin(), place.shape.end(), param.shape, param.shape + param.ndim)) return false;
    const int same = PyObject_RichCompareBool(place.partition.ptr(), partition, Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same;
  }

  Place look_up(PyObject* partition, const ArrayView& param, const ArgName& name) const {
    Place place;
    place.partition = py::reinterpret_borrow<py::object>(partition);
    place.shape.assign(param.shape, param.shape + param.ndim);
    py::tuple shape(param.ndim);
    for (int32_t d = 0; d < param.ndim; ++d) shape[d] = param.shape[d];
    py::object resolved;
    try {
      resolved = resolve_(place.partition, shape);
    } catch (py::error_already_set& error) {
      const std::string message = name.str() + ": " + py::str(error.value()).cast<std::string>();
      if (error.matches(PyExc_TypeError)) throw py::type_error(message);
      if (error.matches(PyExc_ValueError)) throw py::value_error(message);
      throw;
    }
    place.result = make_(place.partition, resolved);
    return place;
  }

  py::object resolve_;
  Result (*make_)(py::handle, const py::object&);
  std::vector<Place> places_;
  size_t next_ = 0;
};

}  // namespace fusedopt
