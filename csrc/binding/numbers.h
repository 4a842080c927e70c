// Numbers of the caller's that may lie on a GPU. Those on the host travel by value; those on a device are read there by
// the kernels, so that no step waits for the device.
#pragma once
#include <vector>

#include "binding/arrays.h"
#include "cuda/device_number.h"

namespace fusedopt {

std::string device_string(dlpack::Device device);  // "cpu", "cuda:1"
inline bool operator==(dlpack::Device a, dlpack::Device b) { return a.type == b.type && a.id == b.id; }

// Throws unless this is one number of a dtype that kernels read; `what` begins "a step counter", "lr".
void check_number(PyObject* object, const ArrayView& view, const ArgName& name, const char* what);

class Number {
 public:
  Number() = default;
  // A Python number, or a one-element array on a GPU; arrays on the host are the caller's to convert.
  Number(const py::object& value, const char* name, bool movable);

  bool on_gpu() const { return bool(array_); }
  double on_host() const;  // waits for the device if the number lies there
  // Where the number lies on this GPU; no data if it lies on the host. A movable one is copied to where it is needed,
  // on that GPU's current stream; another throws if it lies elsewhere.
  cuda::DeviceNumber on(dlpack::Device device, ArrayReader& reader) const;

 private:
  double value_ = 0;
  py::object array_;
  const char* name_ = "";
  bool movable_ = false;
  mutable std::vector<std::pair<int32_t, py::object>> copies_;  // by GPU
};

}  // namespace fusedopt
