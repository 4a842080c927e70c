// Reads the arrays of any library: address, shape, strides, dtype and device, without a copy and without libtorch.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "binding/dlpack.h"
#include "common/dtype.h"

namespace fusedopt {

namespace py = pybind11;

struct ArrayView {  // borrowed from the array; complex numbers appear as a last dimension of two reals
  void* data;
  const int64_t* shape;
  const int64_t* strides;  // in elements; nullptr: C-contiguous
  int32_t ndim;
  DType dtype;
  bool read_only;
  dlpack::Device device;

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool contiguous() const {
    if (!strides) return true;
    int64_t expected = 1;
    for (int32_t d = ndim - 1; d >= 0; expected *= shape[d--])
      if (strides[d] != expected && shape[d] != 1) return false;
    return true;
  }
};

// How messages call an argument: prefix[index]suffix.
struct ArgName {
  const char* prefix;
  int64_t index;  // -1: no index
  const char* suffix;

  std::string str() const;
};

// "params[17] (shape (768, 768), torch.float16)".
std::string describe(const ArgName& name, PyObject* array);
std::string shape_string(const int64_t* shape, int32_t ndim);

// torch may keep a conjugation or negation pending in a flag that no exchange protocol tells of. Only complex tensors
// and views of them have it, so contiguous real ones of more than one element need not be asked.
void refuse_lazy(PyObject* array, const ArgName& name);

// Reads arrays and keeps what the views borrow (buffers, capsules, converted strides) until cleared.
class ArrayReader {
 public:
  ArrayReader() = default;
  ArrayReader(const ArrayReader&) = delete;
  ~ArrayReader() { clear(); }

  // Throws TypeError naming the argument if this is no array that kernels can take.
  void read(PyObject* array, const ArgName& name, ArrayView* view) {
    const Source* source = Py_TYPE(array) == last_.type ? &last_ : &source_of(Py_TYPE(array));
    dlpack::Tensor tensor;
    if (source->exchange && source->exchange->tensor_from_object(array, &tensor) == 0)
      adopt(tensor, false, array, name, view);
    else
      read_slowly(*source, array, name, view);
  }
  void clear();

 private:
  struct Source {  // how a type's instances are read
    PyTypeObject* type = nullptr;
    const dlpack::ExchangeApi* exchange = nullptr;
    bool torch_like = false;  // has data_ptr() and stride()
  };

  const Source& source_of(PyTypeObject* type);
  void adopt(const dlpack::Tensor& tensor, bool read_only, PyObject* array, const ArgName& name, ArrayView* view);
  void read_slowly(const Source& source, PyObject* array, const ArgName& name, ArrayView* view);
  void read_torch(PyObject* array, const ArgName& name, ArrayView* view);
  bool read_buffer(PyObject* array, const ArgName& name, ArrayView* view);
  void read_capsule(PyObject* array, const ArgName& name, ArrayView* view);
  int64_t* keep(std::vector<int64_t> values) { return kept_.emplace_back(std::move(values)).data(); }

  Source last_;
  std::vector<Source> sources_;
  std::deque<std::vector<int64_t>> kept_;
  std::deque<Py_buffer> buffers_;
  std::vector<py::object> objects_;
};

}  // namespace fusedopt
