#include "cpu/launch.h"

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace fusedopt::cpu {
namespace {

// Calls body(begin, end) on ranges that together are [0, total). Ranges begin at multiples of 64 elements; the result
// of an element-wise kernel does not depend on them.
template <typename F>
void parallel_elements(int64_t total, int threads, const F& body) {
  constexpr int64_t kSmallest = 1 << 14;   // below this, waking a thread costs more than it saves
  constexpr int64_t kRangesPerThread = 8;  // so that a thread that lost its core does not hold up the others
  if (total < 2 * kSmallest || threads <= 1) return body(0, total);
  int64_t range = total / (threads * kRangesPerThread);
  range = (range < kSmallest ? kSmallest : range) / 64 * 64;
  parallel_for((total + range - 1) / range, threads,
               [&](int64_t i) { body(i * range, (i + 1) * range < total ? (i + 1) * range : total); });
}

}  // namespace

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, int threads) {
  const auto kernel = cpu_kernels().adamw;
  parallel_elements(table.total(), threads, [&](int64_t begin, int64_t end) { kernel(table, scalars, begin, end); });
  return {};
}

}  // namespace fusedopt::cpu
