#include "binding/numbers.h"

namespace fusedopt {

std::string device_string(dlpack::Device device) {
  switch (device.type) {
    case dlpack::kCpu: return "cpu";
    case dlpack::kCuda: return "cuda:" + std::to_string(device.id);
    case dlpack::kCudaHost: return "cpu (pinned)";
    default: return "DLPack device " + std::to_string(device.type) + ":" + std::to_string(device.id);
  }
}

void check_number(PyObject* object, const ArrayView& view, const ArgName& name, const char* what) {
  if (view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat16)
    throw py::type_error(describe(name, object) + ": " + what + " is float32, float64, int32 or int64");
  if (view.numel() != 1) throw py::value_error(describe(name, object) + ": " + what + " has one element");
}

Number::Number(const py::object& value, const char* name, bool movable) : name_(name), movable_(movable) {
  if (PyFloat_Check(value.ptr()))
    value_ = PyFloat_AS_DOUBLE(value.ptr());
  else
    array_ = value;
}

double Number::on_host() const { return array_ ? py::float_(array_).cast<double>() : value_; }

cuda::DeviceNumber Number::on(dlpack::Device device, ArrayReader& reader) const {
  if (!array_) return {};
  const ArgName name = {name_, -1, ""};
  py::object array = array_;
  for (const auto& [gpu, copy] : copies_)
    if (gpu == device.id) array = copy;
  ArrayView view;
  reader.read(array.ptr(), name, &view);
  check_number(array.ptr(), view, name, name_);
  if (view.device == device) return {view.data, view.dtype};
  if (!movable_ || !py::hasattr(array, "to"))
    throw py::value_error(describe(name, array.ptr()) + ": is on " + device_string(view.device) +
                          ", but the arrays are on " + device_string(device));
  copies_.emplace_back(device.id, array.attr("to")(device_string(device), py::arg("non_blocking") = true));
  return on(device, reader);
}

}  // namespace fusedopt
