// What the runtime keeps about a running grid. Kernels see machine.h only.
#pragma once
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace cuda_host {

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpOperation, kSpinning, kReturned };

struct AsyncCopies {  // of one thread
  struct Copy {
    char* to;
    const char* from;
    int bytes, group;
  };
  std::vector<Copy> in_flight;  // in the order of issue
  int committed_groups = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  const char* operation;  // what it waits in,
  Site site;              // and where
  const uint32_t* spin_word;
  uint32_t spin_mask, spin_value;
  AsyncCopies async_copies;
};

// The lanes of one member mask, who meet again and again. Two sets of values: a fast lane may
// publish its next one before a slow lane has read the last.
struct Meeting {
  uint32_t mask, arrived = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  uint32_t present[2];
  uint64_t value[2][kWarpSize];

  explicit Meeting(uint32_t mask) : mask(mask) {}
};

struct Warp {
  uint32_t lanes, returned;  // masks; a block's last warp may have fewer than 32 lanes
  std::vector<Meeting> meetings;
};

struct Block {
  uint3 index;
  int64_t number;
  int returned, at_barrier, predicates, barrier_result;
  Site barrier_site;
  std::vector<Thread> threads;
  std::vector<State> states;  // apart from the threads: the scheduler reads little else
  std::vector<Warp> warps;
  std::vector<char> shared;  // the __shared__ variables while another block's are in their place
  std::unique_ptr<char, void (*)(void*)> dynamic_shared{nullptr, std::free};
  std::unique_ptr<Stacks> stacks;

  bool done() const { return returned == int(threads.size()); }
};

struct Machine {
  Body body;
  Block* block = nullptr;  // the running thread's, or the one that ran last
  int thread = 0;
  char* shared_segment = nullptr;
  size_t dynamic_shared_bytes = 0;
  std::string failure;  // what ended the launch, or ""
};
extern Machine machine;
extern thread_local bool in_kernel;  // whether this OS thread is running one: another may be

inline Thread& current() { return machine.block->threads[machine.thread]; }

// The running thread returns from its kernel; the rest of its block takes notice.
[[noreturn]] void return_from_kernel();

}  // namespace cuda_host
