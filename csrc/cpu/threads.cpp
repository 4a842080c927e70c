#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace fusedopt {
namespace {

class Pool {
 public:
  // Whether this call did the work; false: another caller is using the pool.
  bool run(int64_t chunks, int helpers, void (*task)(const void*, int64_t), const void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return false;
    start_workers(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      context_ = context;
      chunks_ = chunks;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers < workers_ ? helpers : workers_;
      active_.store(wanted_, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_chunks(task, context, chunks);
    withdraw_unclaimed();
    for (int spins = 0; active_.load(std::memory_order_acquire) > 0; ++spins)
      if (spins > kSpins) std::this_thread::yield();
    return true;
  }

 private:
  static constexpr int kSpins = 4000;  // some ten microseconds: the gap between two optimizers' steps, not between two
                                       // training steps

  void start_workers(int count) try {
    for (; workers_ < count; ++workers_)
      std::thread([this, generation = generation_.load()] { work(generation); }).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: those there are, at least the caller, do all the work.
  }

  [[noreturn]] void work(uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause();
      void (*task)(const void*, int64_t);
      const void* context;
      int64_t chunks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (wanted_ == 0) continue;
        --wanted_;
        task = task_;
        context = context_;
        chunks = chunks_;
      }
      take_chunks(task, context, chunks);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  void take_chunks(void (*task)(const void*, int64_t), const void* context, int64_t chunks) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks;) task(context, i);
  }

  // The caller has run out of chunks: workers that have not woken yet are no longer waited for.
  void withdraw_unclaimed() {
    std::lock_guard<std::mutex> lock(mutex_);
    active_.fetch_sub(wanted_, std::memory_order_relaxed);
    wanted_ = 0;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::mutex turn_;  // held by the caller whose work the pool does
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};  // helpers at work, or about to be
  int wanted_ = 0;              // helpers still to come forward
  int workers_ = 0;
  void (*task_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t chunks_ = 0;
};

// Never destroyed: workers may outlive static destructors.
alignas(Pool) char storage[sizeof(Pool)];

Pool& pool() {
  static Pool* const instance = [] {
    // A forked child has none of the parent's threads and perhaps its locks: it starts with a new pool.
    pthread_atfork(nullptr, nullptr, [] { new (storage) Pool; });
    return new (storage) Pool;
  }();
  return *instance;
}

}  // namespace

void parallel_for(int64_t chunks, int threads, void (*task)(const void*, int64_t), const void* context) {
  const int helpers = int(threads < chunks ? threads : chunks) - 1;
  if (helpers > 0 && pool().run(chunks, helpers, task, context)) return;
  for (int64_t i = 0; i < chunks; ++i) task(context, i);
}

}  // namespace fusedopt
