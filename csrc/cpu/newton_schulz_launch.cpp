// Shares matrices out among threads: small ones whole, large ones one after another, each by all threads.
#include <atomic>

#include "cpu/isa.h"
#include "cpu/newton_schulz.h"
#include "cpu/threads.h"

namespace fusedopt::cpu {
namespace {

NewtonSchulzTask task_of(const NewtonSchulzMatrix& matrix, const NewtonSchulzSchedule& schedule) {
  return {
      &matrix,        schedule.steps.data(), int64_t(schedule.steps.size()), schedule.gram(matrix.rows, matrix.columns),
      schedule.dtype, schedule.arithmetic};
}

bool is_empty(const NewtonSchulzMatrix& matrix) { return matrix.rows == 0 || matrix.columns == 0; }

// Whether one thread should do it alone: handing its parts around would cost more than waiting for the last matrix.
bool is_small(const NewtonSchulzMatrix& matrix) {
  constexpr double kLargest = 384.0 * 384 * 384;
  const double rows = double(matrix.rows), columns = double(matrix.columns);
  return rows * columns * (rows < columns ? rows : columns) <= kLargest;
}

// What one thread needs for the largest matrix that it may meet.
struct Sizes {
  int64_t small = 0, large = 0, small_count = 0;

  Sizes(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule) {
    for (int64_t i = 0; i < count; ++i) {
      const NewtonSchulzMatrix& matrix = matrices[i];
      if (is_empty(matrix)) continue;
      const int64_t bytes = cpu_kernels().newton_schulz_bytes(matrix.rows, matrix.columns, schedule.arithmetic,
                                                              schedule.gram(matrix.rows, matrix.columns));
      int64_t& largest = is_small(matrix) ? small : large;
      if (bytes > largest) largest = bytes;
      small_count += is_small(matrix);
    }
  }
  int64_t workers(int threads) const { return small_count < threads ? small_count : threads; }
};

}  // namespace

int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix* matrices, int64_t count,
                                      const NewtonSchulzSchedule& schedule, int threads) {
  const Sizes sizes(matrices, count, schedule);
  const int64_t small = sizes.small * sizes.workers(threads);
  return small > sizes.large ? small : sizes.large;
}

Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule& schedule,
                            void* workspace, int threads) {
  const auto kernel = cpu_kernels().newton_schulz;
  const Sizes sizes(matrices, count, schedule);
  for (int64_t i = 0; i < count; ++i)
    if (!is_empty(matrices[i]) && !is_small(matrices[i])) kernel(task_of(matrices[i], schedule), workspace, threads);
  std::atomic<int64_t> next{0};
  parallel_for(sizes.workers(threads), threads, [&](int64_t worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      if (!is_empty(matrices[i]) && is_small(matrices[i]))
        kernel(task_of(matrices[i], schedule), static_cast<char*>(workspace) + worker * sizes.small, 1);
  });
  return {};
}

}  // namespace fusedopt::cpu
