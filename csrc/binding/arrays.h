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
  bool complex;  // of the array itself
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
  bool may_be_lazy() const { return !contiguous() || numel() == 1; }  // of real arrays
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
// and views of them have it: see may_be_lazy.
bool is_lazy(PyObject* array);
void refuse_lazy(PyObject* array, const ArgName& name);

// Reads arrays and keeps what the views borrow (buffers, capsules, converted strides) until cleared.
class ArrayReader {
 public:
  ArrayReader() = default;
  ArrayReader(const ArrayReader&) = delete;
  ~ArrayReader() { clear(); }

  // Throws TypeError naming the argument if this is no array that kernels can take.
  void read(PyObject* array, const ArgName& name, ArrayView* view) {
    const Source& source = source_of(Py_TYPE(array));
    dlpack::Tensor tensor;
    if (source.exchange && source.exchange->tensor_from_object(array, &tensor) == 0)
      adopt(tensor, false, array, name, view);
    else
      read_slowly(source, array, name, view);
  }
  void clear();
  // For producers that are handed the stream that their arrays will be used on (DLPack's __dlpack__(stream=...)).
  void use_stream(const py::object& stream) { stream_ = stream; }
  // The stream that the array's library works on now, on that device; false where its type does not tell.
  bool current_stream(PyObject* array, dlpack::Device device, void** stream);
  // A second owner of the array, or nullptr where there is no way to be one.
  dlpack::ManagedTensorVersioned* own(PyObject* array);

 private:
  struct Source {  // how a type's instances are read
    PyTypeObject* type = nullptr;
    const dlpack::ExchangeApi* exchange = nullptr;
    bool torch_like = false;  // has data_ptr() and stride()
  };

  const Source& source_of(PyTypeObject* type) {
    for (const Source& known : sources_)
      if (known.type == type) return known;
    return add_source(type);
  }
  const Source& add_source(PyTypeObject* type);
  void adopt(const dlpack::Tensor& tensor, bool read_only, PyObject* array, const ArgName& name, ArrayView* view);
  void read_slowly(const Source& source, PyObject* array, const ArgName& name, ArrayView* view);
  void read_torch(PyObject* array, const ArgName& name, ArrayView* view);
  bool read_buffer(PyObject* array, const ArgName& name, ArrayView* view);
  void read_capsule(PyObject* array, const ArgName& name, ArrayView* view);
  int64_t* keep(std::vector<int64_t> values) { return kept_.emplace_back(std::move(values)).data(); }

  std::vector<Source> sources_;
  std::deque<std::vector<int64_t>> kept_;
  std::deque<Py_buffer> buffers_;
  std::vector<py::object> objects_;
  py::object stream_ = py::none();
};

// Keeps a second owner of each state tensor between steps. torch reads a tensor that has one owner more slowly (48 ns
// against 18), because taking a reference to it moves the ownership of its Python object.
class SecondOwners {
 public:
  SecondOwners() = default;
  SecondOwners(const SecondOwners&) = delete;
  ~SecondOwners() { resize(0); }

  // The next array of a walk; walks mostly see the same arrays in the same order.
  void keep(ArrayReader& reader, PyObject* array) {
    if (next_ < owners_.size() && owners_[next_].array == array)
      ++next_;
    else
      replace(reader, array);
  }
  void rewind() { next_ = 0; }
  void drop_rest() { resize(next_); }

 private:
  struct Owner {
    PyObject* array;
    dlpack::ManagedTensorVersioned* tensor;
  };

  void replace(ArrayReader& reader, PyObject* array);
  void resize(size_t size);

  std::vector<Owner> owners_;
  size_t next_ = 0;
};

}  // namespace fusedopt
