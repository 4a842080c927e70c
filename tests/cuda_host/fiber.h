// A fiber: a stack, and a switch that saves what the ABI calls preserved and nothing else. A switch
// takes nanoseconds, where swapcontext makes two system calls. The one who resumes is the
// scheduler, on the OS thread's own stack.
#pragma once
#include <cstddef>
#include <vector>

namespace cuda_host {

class Fiber {
 public:
  // The next resume() calls entry(), which ends by suspend_for_good(). A fiber may be started again
  // at any time: what was on its stack is forgotten.
  void start(char* stack, void (*entry)());
  void resume();

  void suspend();
  [[noreturn]] void suspend_for_good();

 private:
  static void enter();

  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // ASan's
};

// Stacks side by side in one mapping, each above a page that traps when it overflows.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 << 10;
  explicit Stacks(size_t count);
  ~Stacks();
  Stacks(const Stacks&) = delete;

  char* operator[](size_t i) const { return memory_ + i * kBytes; }
  size_t size() const { return count_; }
  bool contains(const void* address) const { return address >= memory_ && address < memory_ + count_ * kBytes; }

 private:
  size_t count_;
  char* memory_;
};

}  // namespace cuda_host
