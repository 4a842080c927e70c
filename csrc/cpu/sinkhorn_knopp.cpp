// Sinkhorn-Knopp on the CPU: one matrix a lane, each pack of matrices in registers and L1 from end to end.
#include "cpu/sinkhorn_knopp.h"

#include "cpu/entries.h"
#include "cpu/pack_bits.h"
#include "math/sinkhorn_knopp.h"

namespace fusedopt::FUSEDOPT_TARGET {
namespace {

// Matrices first ... first + count of `size` elements each, into lanes; lanes beyond are copies of the first.
template <typename S>
void load_lanes(const void* from, int64_t size, int64_t first, int64_t count, Pack<S>* to) {
  const S* const base = static_cast<const S*>(from) + first * size;
  for (int64_t k = 0; k < size; ++k) {
    S lane[Pack<S>::kLanes];
    for (int64_t l = 0; l < Pack<S>::kLanes; ++l) lane[l] = base[(l < count ? l : 0) * size + k];
    memcpy(&to[k].v, lane, kPackBytes);
  }
}
template <typename S>
void store_lanes(const Pack<S>* from, int64_t size, int64_t first, int64_t count, void* to) {
  S* const base = static_cast<S*>(to) + first * size;
  for (int64_t k = 0; k < size; ++k) {
    S lane[Pack<S>::kLanes];
    memcpy(lane, &from[k].v, kPackBytes);
    for (int64_t l = 0; l < count; ++l) base[l * size + k] = lane[l];
  }
}

template <typename S, int N, int M>
void run(const KnoppTask& task, int64_t begin, int64_t end) {
  using V = Pack<S>;
  SinkhornKnopp<S, V, N, M> knopp;
  knopp.n = int(task.n);
  knopp.m = int(task.m);
  V values[kMostKnoppRows * kMostKnoppRows], history[(kMostKnoppIterations + 1) * 2 * kMostKnoppRows];
  const int64_t size = task.n * task.m;
  for (int64_t first = begin; first < end; first += V::kLanes) {
    const int64_t count = end - first < V::kLanes ? end - first : V::kLanes;
    load_lanes(task.logits, size, first, count, values);
    knopp.load(values);
    if (task.up) {
      load_lanes(task.up, size, first, count, values);
      knopp.backward(task.iterations, values, history);
    } else {
      knopp.forward(task.iterations, values);
    }
    store_lanes(values, size, first, count, task.result);
  }
}

template <typename S>
void run_shape(const KnoppTask& task, int64_t begin, int64_t end) {
  if (task.n == 4 && task.m == 4)
    run<S, 4, 4>(task, begin, end);
  else
    run<S, 0, 0>(task, begin, end);
}

}  // namespace

void sinkhorn_knopp(const KnoppTask& task, int64_t begin, int64_t end) {
  task.single ? run_shape<float>(task, begin, end) : run_shape<double>(task, begin, end);
}

}  // namespace fusedopt::FUSEDOPT_TARGET
