#include "binding/arrays.h"

#include <cstring>
#include <optional>

namespace fusedopt {
namespace {

// The dtype in kernels' terms, and whether it is complex; nothing if kernels have no such dtype.
struct Element {
  DType dtype;
  bool complex;
};

std::optional<Element> element_of(dlpack::DataType type) {
  using namespace dlpack;
  if (type.lanes != 1) return {};
  switch (type.code << 8 | type.bits) {
    case kFloat << 8 | 16: return Element{DType::kFloat16, false};
    case kFloat << 8 | 32: return Element{DType::kFloat32, false};
    case kFloat << 8 | 64: return Element{DType::kFloat64, false};
    case kBfloat << 8 | 16: return Element{DType::kBFloat16, false};
    case kComplex << 8 | 64: return Element{DType::kFloat32, true};
    case kComplex << 8 | 128: return Element{DType::kFloat64, true};
    case kInt << 8 | 32: return Element{DType::kInt32, false};
    case kInt << 8 | 64: return Element{DType::kInt64, false};
    default: return {};
  }
}

[[noreturn]] void refuse(const ArgName& name, PyObject* array, const std::string& why) {
  throw py::type_error(describe(name, array) + ": " + why);
}

std::string text(py::handle object) { return py::str(object).cast<std::string>(); }

std::string first_line(py::handle error) {  // torch appends a C++ stack trace
  const std::string all = text(error);
  return all.substr(0, all.find('\n'));
}

// An array that its own library can't export: says why, as far as it can be told.
[[noreturn]] void refuse_unreadable(const ArgName& name, PyObject* array, py::handle error) {
  const py::handle object(array);
  if (py::getattr(object, "is_sparse", py::bool_(false)).ptr() == Py_True)
    throw std::runtime_error(describe(name, array) + ": sparse gradients and tensors are not supported");
  const std::string device = py::hasattr(object, "device") ? " (device " + text(object.attr("device")) + ")" : "";
  refuse(name, array, "can't be read" + device + ": " + first_line(error));
}

// What a method without arguments says; false if the array's library has no such method.
bool says(PyObject* array, PyObject* method) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(array, method));
  if (answer) return answer.ptr() == Py_True;
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  return false;
}

}  // namespace

std::string ArgName::str() const {
  return index < 0 ? std::string(prefix) + suffix : prefix + ("[" + std::to_string(index) + "]") + suffix;
}

std::string shape_string(const int64_t* shape, int32_t ndim) {
  std::string s = "(";
  for (int32_t d = 0; d < ndim; ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + (ndim == 1 ? ",)" : ")");
}

std::string describe(const ArgName& name, PyObject* array) {
  const py::handle object(array);
  if (!py::hasattr(object, "shape") || !py::hasattr(object, "dtype"))
    return name.str() + " (" + Py_TYPE(array)->tp_name + ")";
  std::vector<int64_t> shape;
  for (const py::handle n : object.attr("shape")) shape.push_back(n.cast<int64_t>());
  return name.str() + " (shape " + shape_string(shape.data(), int32_t(shape.size())) + ", " +
         text(object.attr("dtype")) + ")";
}

void ArrayReader::clear() {
  kept_.clear();
  for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
  buffers_.clear();
  objects_.clear();
}

const ArrayReader::Source& ArrayReader::add_source(PyTypeObject* type) {
  Source source;
  source.type = type;
  Py_INCREF(type);  // kept for the life of the process, so that no other type can come to lie at its address
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  if (py::hasattr(handle, "__dlpack_c_exchange_api__")) {
    const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->version.major != 1) api = api->previous;
    if (api && api->tensor_from_object) source.exchange = api;
  }
  source.torch_like = py::hasattr(handle, "data_ptr") && py::hasattr(handle, "stride");
  return sources_.emplace_back(source);
}

void ArrayReader::adopt(const dlpack::Tensor& tensor, bool read_only, PyObject* array, const ArgName& name,
                        ArrayView* view) {
  const std::optional<Element> element = element_of(tensor.dtype);
  if (!element) refuse(name, array, "this dtype is not supported");
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view->shape = tensor.shape;
  view->strides = tensor.strides;
  view->ndim = tensor.ndim;
  view->dtype = element->dtype;
  view->read_only = read_only;
  view->complex = element->complex;
  view->device = tensor.device;
  if (__builtin_expect(element->complex, false)) {
    std::vector<int64_t> shape(view->shape, view->shape + view->ndim), strides(view->ndim + 1, 1);
    int64_t contiguous = 2;
    for (int32_t d = view->ndim - 1; d >= 0; contiguous *= shape[d--])
      strides[d] = view->strides ? 2 * view->strides[d] : contiguous;
    shape.push_back(2);
    view->ndim += 1;
    view->shape = keep(std::move(shape));
    view->strides = keep(std::move(strides));
  }
  if (__builtin_expect(!tensor.data && view->numel() > 0, false))
    refuse(name, array,
           "has no memory of its own (a DTensor, FakeTensor or other wrapper); pass the tensor inside, for a DTensor "
           "x.to_local()");
  if (__builtin_expect(element->complex, false)) refuse_lazy(array, name);
}

bool is_lazy(PyObject* array) {
  static PyObject* const is_conj = PyUnicode_InternFromString("is_conj");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  return says(array, is_neg) || says(array, is_conj);
}

void refuse_lazy(PyObject* array, const ArgName& name) {
  if (is_lazy(array)) refuse(name, array, "has a pending conjugation or negation; pass x.resolve_conj().resolve_neg()");
}

void ArrayReader::read_slowly(const Source& source, PyObject* array, const ArgName& name, ArrayView* view) {
  if (source.exchange) {
    const py::error_already_set error;  // what the exchange raised
    refuse_unreadable(name, array, error.value());
  }
  if (source.torch_like) return read_torch(array, name, view);
  if (read_buffer(array, name, view)) return;
  if (!py::hasattr(array, "__dlpack__"))
    refuse(name, array, "expected an array of torch, NumPy or any library with __dlpack__");
  read_capsule(array, name, view);
}

// torch before its exchange API (2.10): the same facts through attributes.
void ArrayReader::read_torch(PyObject* array, const ArgName& name, ArrayView* view) try {
  static const std::pair<const char*, dlpack::DataType> kTypes[] = {
      {"torch.float32", {dlpack::kFloat, 32, 1}},     {"torch.float64", {dlpack::kFloat, 64, 1}},
      {"torch.float16", {dlpack::kFloat, 16, 1}},     {"torch.bfloat16", {dlpack::kBfloat, 16, 1}},
      {"torch.complex64", {dlpack::kComplex, 64, 1}}, {"torch.complex128", {dlpack::kComplex, 128, 1}},
      {"torch.int32", {dlpack::kInt, 32, 1}},         {"torch.int64", {dlpack::kInt, 64, 1}}};
  const py::handle object(array);
  if (text(object.attr("layout")) != "torch.strided") refuse(name, array, "expected a dense (strided) tensor");
  dlpack::Tensor tensor = {};
  const std::string dtype = text(object.attr("dtype"));
  for (const auto& [type_name, type] : kTypes)
    if (dtype == type_name) tensor.dtype = type;
  const std::string device = object.attr("device").attr("type").cast<std::string>();
  if (device != "cpu" && device != "cuda") refuse(name, array, "is on device '" + device + "', expected cpu or cuda");
  tensor.device.type = device == "cpu" ? dlpack::kCpu : dlpack::kCuda;
  if (device == "cuda") tensor.device.id = object.attr("device").attr("index").cast<int32_t>();
  tensor.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  tensor.ndim = int32_t(py::len(object.attr("shape")));
  std::vector<int64_t> shape, strides;
  for (const py::handle n : object.attr("shape")) shape.push_back(n.cast<int64_t>());
  for (const py::handle n : object.attr("stride")()) strides.push_back(n.cast<int64_t>());
  tensor.shape = keep(std::move(shape));
  tensor.strides = keep(std::move(strides));
  adopt(tensor, false, array, name, view);
} catch (py::error_already_set& error) {
  refuse_unreadable(name, array, error.value());
}

// NumPy and whatever else has the buffer protocol. False: it has not.
bool ArrayReader::read_buffer(PyObject* array, const ArgName& name, ArrayView* view) {
  py::object source = py::reinterpret_borrow<py::object>(array);
  const bool bf16 = py::hasattr(source, "dtype") && text(source.attr("dtype")) == "bfloat16";  // ml_dtypes
  if (bf16 && py::hasattr(source, "view")) source = source.attr("view")("uint16");
  Py_buffer& buffer = buffers_.emplace_back();
  if (PyObject_GetBuffer(source.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    buffers_.pop_back();
    PyErr_Clear();
    return false;
  }
  static const std::pair<const char*, dlpack::DataType> kFormats[] = {
      {"f", {dlpack::kFloat, 32, 1}},    {"d", {dlpack::kFloat, 64, 1}},     {"e", {dlpack::kFloat, 16, 1}},
      {"Zf", {dlpack::kComplex, 64, 1}}, {"Zd", {dlpack::kComplex, 128, 1}}, {"i", {dlpack::kInt, 32, 1}},
      {"l", {dlpack::kInt, 64, 1}},      {"q", {dlpack::kInt, 64, 1}}};
  dlpack::Tensor tensor = {};
  for (const auto& [format, type] : kFormats)
    if (strcmp(buffer.format, format) == 0) tensor.dtype = type;
  if (bf16) tensor.dtype = {dlpack::kBfloat, 16, 1};
  tensor.data = buffer.buf;
  tensor.device = {dlpack::kCpu, 0};
  tensor.ndim = buffer.ndim;
  std::vector<int64_t> shape, strides;
  for (int d = 0; d < buffer.ndim; ++d) {
    shape.push_back(buffer.shape[d]);
    if (buffer.strides[d] % buffer.itemsize) refuse(name, array, "its strides are not whole elements");
    strides.push_back(buffer.strides[d] / buffer.itemsize);
  }
  tensor.shape = keep(std::move(shape));
  tensor.strides = keep(std::move(strides));
  adopt(tensor, buffer.readonly, array, name, view);
  return true;
}

void ArrayReader::read_capsule(PyObject* array, const ArgName& name, ArrayView* view) try {
  const py::handle object(array);
  py::object capsule;
  py::dict options;
  if (!stream_.is_none()) {
    const py::tuple device = object.attr("__dlpack_device__")();
    const auto stream = stream_.cast<uintptr_t>();
    if (device[0].cast<int>() == dlpack::kCuda) options["stream"] = stream ? stream : 1;  // 1: what CUDA's 0 stands for
  }
  try {
    capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **options);
  } catch (py::error_already_set& error) {  // a producer older than DLPack 1.0
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = object.attr("__dlpack__")(**options);
  }
  objects_.push_back(capsule);  // the capsule frees its tensor when it goes
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed =
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) refuse(name, array, "speaks another major version of DLPack");
    return adopt(managed->tensor, managed->flags & dlpack::kReadOnly, array, name, view);
  }
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  adopt(managed->tensor, false, array, name, view);
} catch (py::error_already_set& error) {
  refuse_unreadable(name, array, error.value());
}

bool ArrayReader::current_stream(PyObject* array, dlpack::Device device, void** stream) {
  const Source& source = source_of(Py_TYPE(array));
  if (!source.exchange || !source.exchange->current_work_stream) return false;
  if (source.exchange->current_work_stream(device.type, device.id, stream) != 0) throw py::error_already_set();
  return true;
}

dlpack::ManagedTensorVersioned* ArrayReader::own(PyObject* array) {
  const Source& source = source_of(Py_TYPE(array));
  dlpack::ManagedTensorVersioned* tensor = nullptr;
  if (source.exchange && source.exchange->managed_from_object &&
      source.exchange->managed_from_object(array, &tensor) != 0) {
    PyErr_Clear();  // it will be read with one owner
    return nullptr;
  }
  return tensor;
}

void SecondOwners::replace(ArrayReader& reader, PyObject* array) {
  resize(next_);
  owners_.push_back({array, reader.own(array)});
  ++next_;
}

void SecondOwners::resize(size_t size) {
  for (; owners_.size() > size; owners_.pop_back())
    if (dlpack::ManagedTensorVersioned* tensor = owners_.back().tensor) tensor->deleter(tensor);
}

}  // namespace fusedopt
