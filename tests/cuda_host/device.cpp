// The fake device: its properties, the checks of a launch that a driver makes, and the runtime API
// as far as launchers use it.
#include "device.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>

#include "machine.h"
#include "symbols.h"

namespace cuda_host {
namespace {

// CUDA C++ Programming Guide, "Compute Capabilities".
struct Architecture {
  int number, threads_per_sm, blocks_per_sm, shared_per_sm, shared_per_block;
};
constexpr int kKilobyte = 1024;
constexpr int kReservedShared = 1 * kKilobyte;  // per block, by the system
constexpr Architecture kArchitectures[] = {
    {75, 1024, 16, 64 * kKilobyte, 64 * kKilobyte},   {80, 2048, 32, 164 * kKilobyte, 163 * kKilobyte},
    {86, 1536, 16, 100 * kKilobyte, 99 * kKilobyte},  {89, 1536, 24, 100 * kKilobyte, 99 * kKilobyte},
    {90, 2048, 32, 228 * kKilobyte, 227 * kKilobyte}, {100, 2048, 32, 228 * kKilobyte, 227 * kKilobyte},
    {120, 1536, 24, 100 * kKilobyte, 99 * kKilobyte},
};
constexpr int kSharedWithoutOptIn = 48 * kKilobyte;
constexpr int kThreadsPerBlock = 1024;

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

int sm_count() { return from_environment("CUDA_HOST_SMS", 4); }
int device_count() { return from_environment("CUDA_HOST_DEVICES", 1); }
thread_local int current_device = 0;

const Architecture& architecture() {
  const int wanted = from_environment("CUDA_HOST_ARCH", 90);
  for (const Architecture& a : kArchitectures)
    if (a.number == wanted) return a;
  std::fprintf(stderr, "cuda_host: CUDA_HOST_ARCH=%d is not a known architecture\n", wanted);
  std::abort();
}

std::mutex mutex;  // guards what follows: launches may come from any thread
std::unordered_map<const void*, int> shared_opt_in;
std::set<std::string> kernels;
std::string launches, failure;
int attempted = 0;  // launches since they were taken
std::atomic<cudaError_t> last_error{cudaSuccess};

int blocks_per_sm(int threads, size_t dynamic_shared) {
  const Architecture& a = architecture();
  if (threads < 1 || threads > kThreadsPerBlock) return 0;
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  return std::min({a.blocks_per_sm, a.threads_per_sm / (warps * kWarpSize),
                   int(a.shared_per_sm / (dynamic_shared + kReservedShared))});
}

cudaError_t check(const cudaLaunchConfig_t& c, const void* kernel, bool cooperative) {
  if (++attempted == from_environment("CUDA_HOST_FAIL", 0)) return cudaErrorNoKernelImageForDevice;
  const dim3 g = c.gridDim, b = c.blockDim;
  const int64_t threads = int64_t(b.x) * b.y * b.z;
  if (g.x < 1 || g.x > 0x7fffffffu || g.y < 1 || g.y > 65535 || g.z < 1 || g.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (threads < 1 || threads > kThreadsPerBlock || b.z > 64) return cudaErrorInvalidConfiguration;
  const auto opted = shared_opt_in.find(kernel);
  const int allowed = opted == shared_opt_in.end() ? kSharedWithoutOptIn : opted->second;
  if (c.dynamicSmemBytes > size_t(allowed)) return cudaErrorInvalidValue;
  const int64_t room = int64_t(sm_count()) * blocks_per_sm(int(threads), c.dynamicSmemBytes);
  if (cooperative && int64_t(g.x) * g.y * g.z > room) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

#if CUDA_HOST_SANITIZE_ADDRESS
constexpr char kSanitizer[] = "\taddress";
#elif CUDA_HOST_SANITIZE_RACE
constexpr char kSanitizer[] = "\trace";
#else
constexpr char kSanitizer[] = "";
#endif

void note(const cudaLaunchConfig_t& c, const std::string& name, bool cooperative) {
  if (kernels.insert(name).second)
    if (const char* log = std::getenv("CUDA_HOST_KERNEL_LOG"))
      std::ofstream(log, std::ios::app) << name << kSanitizer << '\n';
  std::ostringstream line;
  const dim3 g = c.gridDim, b = c.blockDim;
  line << name << '\t' << g.x << ',' << g.y << ',' << g.z << '\t' << b.x << ',' << b.y << ',' << b.z << '\t'
       << c.dynamicSmemBytes << '\t' << reinterpret_cast<uintptr_t>(c.stream) << '\t'
       << (cooperative ? "cooperative" : "") << '\t' << current_device << '\n';
  launches += line.str();
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

cudaError_t launch_body(const cudaLaunchConfig_t& config, const void* kernel, Body body) {
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config.attrs[i].val.cooperative != 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const cudaError_t refused = check(config, kernel, cooperative);
    if (refused != cudaSuccess) return remember(refused);
    note(config, function_name(kernel), cooperative);
  }
  const dim3 grid = config.gridDim;
  // A plain grid gets no promise that its blocks are resident together: here they never are.
  const int64_t resident = cooperative ? int64_t(grid.x) * grid.y * grid.z : 1;
  const std::string wrong = run_grid(grid, config.blockDim, config.dynamicSmemBytes, resident, body);
  if (wrong.empty()) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  failure = function_name(kernel) + ": " + wrong;
  return remember(cudaErrorLaunchFailure);
}

}  // namespace cuda_host

#pragma GCC visibility push(default)  // what tests and other libraries may call

using namespace cuda_host;

const char* cuda_host_kernels() {
  const std::lock_guard<std::mutex> lock(mutex);
  static std::string text;
  text.clear();
  for (const std::string& name : kernels) text += name + '\n';
  return text.c_str();
}

const char* cuda_host_take_launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  static std::string text;
  text.swap(launches);
  launches.clear();
  attempted = 0;
  return text.c_str();
}

extern "C" {

cudaError_t CUDARTAPI cudaGetLastError() { return last_error.exchange(cudaSuccess); }
cudaError_t CUDARTAPI cudaPeekAtLastError() { return last_error; }

const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure: return failure.c_str();
    default: return "an error that the host shim does not know";
  }
}

cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = device_count();
  return remember(*count ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
  const Architecture& a = architecture();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = sm_count(); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = a.number / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = a.number % 10; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = a.threads_per_sm; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = kThreadsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedWithoutOptIn; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = a.shared_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = a.shared_per_sm; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = kWarpSize; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 1; return cudaSuccess;
    default: return remember(cudaErrorInvalidValue);
  }
}

// What the runtime's template of the same name without "WithFlags" calls.
cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                             size_t shared, unsigned) {
  *blocks = blocks_per_sm(threads, shared);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > architecture().shared_per_block) return remember(cudaErrorInvalidValue);
  shared_opt_in[kernel] = value;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = kThreadsPerBlock;
  attributes->maxDynamicSharedSizeBytes = kSharedWithoutOptIn;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

}  // extern "C"

#pragma GCC visibility pop
