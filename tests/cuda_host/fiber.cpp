#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if CUDA_HOST_SANITIZE_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_unpoison_memory_region(...)
#endif

#if !defined(__x86_64__)
#error "the context switch is written for x86-64"
#endif

// cuda_host_switch(&save_stack_pointer, load_stack_pointer)
extern "C" void cuda_host_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_host_switch
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");

namespace cuda_host {
namespace {

struct {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
} scheduler;
Fiber* running = nullptr;

}  // namespace

void Fiber::start(char* stack, void (*entry)()) {
  stack_ = stack;
  entry_ = entry;
  // Tops at equal distances of a power of two would compete for the same few cache lines.
  const size_t color = reinterpret_cast<uintptr_t>(stack) / Stacks::kBytes % 32 * 320;
  void** top = reinterpret_cast<void**>(stack + Stacks::kBytes - color);
  *--top = nullptr;                                 // enter()'s return address: it has none
  *--top = reinterpret_cast<void*>(&Fiber::enter);  // what the switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;     // preserved registers
  stack_pointer_ = top;
}

void Fiber::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
  running->entry_();
  __builtin_unreachable();
}

void Fiber::resume() {
  running = this;
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, Stacks::kBytes);
  cuda_host_switch(&scheduler.stack_pointer, stack_pointer_);
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler.stack_bottom, scheduler.stack_bytes);
  cuda_host_switch(&stack_pointer_, scheduler.stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler.stack_bottom, &scheduler.stack_bytes);
}

void Fiber::suspend_for_good() {
  __sanitizer_start_switch_fiber(nullptr, scheduler.stack_bottom, scheduler.stack_bytes);
  cuda_host_switch(&stack_pointer_, scheduler.stack_pointer);
  __builtin_unreachable();
}

Stacks::Stacks(size_t count) : count_(count) {
  void* memory =
      mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < count; ++i) mprotect((*this)[i], page, PROT_NONE);
}

Stacks::~Stacks() {
  __asan_unpoison_memory_region(memory_, count_ * kBytes);
  munmap(memory_, count_ * kBytes);
}

}  // namespace cuda_host
