// The machine that kernels run on: thread blocks of fibers on one OS thread. A fiber runs until it
// waits or returns, so whatever two threads do between two barriers happens in one order here, and
// in the opposite one under another CUDA_HOST_SEED: an order that the kernel does not enforce shows
// as a wrong value.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace cuda_host {

constexpr int kWarpSize = 32;

struct Site {  // where in the source a thread waits; as a default argument, the caller's own line
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch: it returns cudaErrorLaunchFailure, and cudaGetErrorString tells this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads: returns once every thread of the block has called it, how many had a predicate.
int block_barrier(bool predicate, Site site);

// Publishes this lane's value and returns once every lane of `mask` has. A warp exchange orders no
// memory; __syncwarp does, which matters to the race detector only.
struct Exchange {
  const uint64_t* value;  // by lane; valid until the calling lane waits again
  uint32_t present;       // lanes that published one
};
Exchange warp_exchange(uint32_t mask, uint64_t value, const char* operation, Site site);
void warp_barrier(uint32_t mask, Site site);

// Waits, letting others run, while (*word & mask) == value.
void wait_while_equal(const uint32_t* word, uint32_t mask, uint32_t value, Site site);

int thread_in_block();
inline int lane_id() { return thread_in_block() % kWarpSize; }

char* dynamic_shared_memory();
bool is_shared_memory(const void* address, size_t bytes);

// cp.async: copies of 16 bytes (all but `bytes` of them zeros), in groups, that land at a wait.
void start_async_copy(void* to, const void* from, int bytes);
void commit_async_copies();
void wait_for_async_copies(int pending_groups);

// A memory fence. With one OS thread it has no effect on memory; the race detector takes notice.
void fence();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a lane's value has 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A GPU faults on a vector access that is not aligned to its size; x86 often does not.
template <typename T>
void check_alignment(const T* address, size_t alignment = sizeof(T)) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail("misaligned access: %p is not a multiple of %zu", static_cast<const void*>(address), alignment);
}

struct Body {  // a kernel with its arguments, as one thread runs it
  void (*run)(void* call);
  void* call;
};

// Checks the configuration as the driver would, notes the launch, and runs the grid to its end.
cudaError_t launch_body(const cudaLaunchConfig_t& config, const void* kernel, Body body);

template <typename... P, typename... A>
cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(P...), A&... arguments) {
  auto call = [&] { kernel(arguments...); };
  const auto run = [](void* it) { (*static_cast<decltype(&call)>(it))(); };
  return launch_body(config, reinterpret_cast<const void*>(kernel), Body{run, &call});
}

// Runs every thread of a grid, `resident` thread blocks at a time; returns what went wrong, or "".
std::string run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, int64_t resident, Body body);

}  // namespace cuda_host
