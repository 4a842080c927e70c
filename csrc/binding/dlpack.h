// The part of DLPack's C ABI (version 1) that reading needs: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace fusedopt::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: C-contiguous
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct ManagedTensor {  // capsule "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
struct ManagedTensorVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};
constexpr uint64_t kReadOnly = 1;

// What `type.__dlpack_c_exchange_api__` (capsule "dlpack_exchange_api") points to.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  void* allocate;
  int (*managed_from_object)(void* object, ManagedTensorVersioned** out);  // owned
  void* object_from_managed;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed, valid while the object is; may be nullptr
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace fusedopt::dlpack
