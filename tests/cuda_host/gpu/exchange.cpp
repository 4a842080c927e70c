// A fake GPU's memory: torch's DLPack exchange, telling of CPU memory that it lies on a GPU. Compiled into the module
// under test only; fake_gpu.py installs it.
#include <cstdint>
#include <map>

#include "binding/dlpack.h"

using namespace fusedopt::dlpack;

namespace {

constexpr int kHost = -1;

const ExchangeApi* torchs = nullptr;
int elsewhere = 0;          // where memory lies that was not placed: a GPU's number, or kHost
bool host_scalars = false;  // whether 0-d tensors lie on the host, wherever they were placed
struct Range {
  uintptr_t end;
  int device;
};
std::map<uintptr_t, Range> placed;
std::map<int, void*> streams;

Device device_of(const void* data, int ndim) {
  int device = elsewhere;
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto next = placed.upper_bound(address);
  if (next != placed.begin() && address < (--next)->second.end) device = next->second.device;
  if (device == kHost || (host_scalars && ndim == 0)) return {kCpu, 0};
  return {kCuda, device};
}

int tensor_from_object(void* object, Tensor* out) {
  const int status = torchs->tensor_from_object(object, out);
  if (status == 0) out->device = device_of(out->data, out->ndim);
  return status;
}

int current_work_stream(int32_t, int32_t device, void** stream) {
  *stream = streams[device];
  return 0;
}

ExchangeApi ours;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const void* fake_gpu_exchange(const ExchangeApi* real) {
  torchs = real;
  ours = *real;
  ours.previous = nullptr;
  ours.tensor_from_object = tensor_from_object;
  ours.current_work_stream = current_work_stream;
  return &ours;
}
void fake_gpu_place(uintptr_t begin, uintptr_t end, int device) { placed[begin] = {end, device}; }
void fake_gpu_forget() { placed.clear(); }
void fake_gpu_elsewhere(int device) { elsewhere = device; }
void fake_gpu_host_scalars(int yes) { host_scalars = yes; }
void fake_gpu_stream(int device, void* stream) { streams[device] = stream; }

}  // extern "C"
#pragma GCC visibility pop
