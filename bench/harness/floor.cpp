// The floor of AdamW: read p, g, m, v and write p, m, v in place, over the very tensors of a case. That of blockwise
// Adam is the same without v (second is nullptr).
//
// Page placement changes the speed of memory by a factor of two, so a copy between other arrays says
// little. The arithmetic is one integer AND and ADD; the caller passes mask = 0, which the compiler
// can't know, so every word is written back unchanged and the data survive.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

struct Table {
  int64_t count;
  const int64_t* numel;
  void* const* param;
  void* const* grad;
  void* const* first;
  void* const* second;
  uint32_t mask;
};

template <typename P, typename S>
void sweep_tensor(P* __restrict p, const P* __restrict g, S* __restrict m, S* __restrict v, int64_t n, uint32_t mask) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = g[i] & mask;
    p[i] = static_cast<P>(p[i] + word);
    m[i] = static_cast<S>(m[i] + word);
    v[i] = static_cast<S>(v[i] + word);
  }
}

template <typename P, typename S>
void sweep_tensor(P* __restrict p, const P* __restrict g, S* __restrict m, int64_t n, uint32_t mask) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = g[i] & mask;
    p[i] = static_cast<P>(p[i] + word);
    m[i] = static_cast<S>(m[i] + word);
  }
}

// Elements [begin, end) of the list taken as one long array.
template <typename P, typename S>
void sweep_range(const Table& table, int64_t begin, int64_t end) {
  int64_t start = 0;  // of the current tensor
  for (int64_t i = 0; i < table.count && start < end; start += table.numel[i++]) {
    const int64_t from = std::max<int64_t>(begin - start, 0);
    const int64_t to = std::min(end - start, table.numel[i]);
    if (from >= to) continue;
    P* const param = static_cast<P*>(table.param[i]) + from;
    const P* const grad = static_cast<P*>(table.grad[i]) + from;
    S* const first = static_cast<S*>(table.first[i]) + from;
    if (table.second)
      sweep_tensor(param, grad, first, static_cast<S*>(table.second[i]) + from, to - from, table.mask);
    else
      sweep_tensor(param, grad, first, to - from, table.mask);
  }
}

template <typename P, typename S>
void sweep(const Table& table, int64_t threads) {
  constexpr int64_t kFewest = 1 << 16;  // elements: below, starting a thread costs more than it saves
  int64_t total = 0;
  for (int64_t i = 0; i < table.count; ++i) total += table.numel[i];
  threads = std::max<int64_t>(1, std::min(threads, total / kFewest));
  const int64_t share = (total / threads + 63) / 64 * 64;
  std::vector<std::thread> helpers;
  for (int64_t t = 1; t < threads; ++t) {
    helpers.emplace_back(sweep_range<P, S>, table, t * share, std::min(total, (t + 1) * share));
  }
  sweep_range<P, S>(table, 0, std::min(total, share));
  for (std::thread& helper : helpers) helper.join();
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / sizeof(float),
              kSums = 12;  // enough to hide the latency, few enough for registers

void multiply_add(int64_t rounds, float* result) {
  const Vector factor = Vector{} + *result;
  Vector sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = factor * float(k);
  for (int64_t i = 0; i < rounds; ++i)
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] * factor + factor;
  for (int k = 0; k < kSums; ++k) *result += sums[k][0];
}

}  // namespace

// As many float multiply-adds as make up these flops (a multiply-add is two), all in registers. Returns a number that
// depends on every one of them.
extern "C" float multiply_adds(double flops, int64_t threads) {
  const int64_t rounds = static_cast<int64_t>(flops / (2.0 * kLanes * kSums * threads)) + 1;
  std::vector<float> results(16 * threads, 0.5f);  // a cache line each
  std::vector<std::thread> helpers;
  for (int64_t t = 1; t < threads; ++t) helpers.emplace_back(multiply_add, rounds, &results[16 * t]);
  multiply_add(rounds, results.data());
  for (std::thread& helper : helpers) helper.join();
  float sum = 0;
  for (int64_t t = 0; t < threads; ++t) sum += results[16 * t];
  return sum;
}

// Parameters and gradients of param_bytes per element, states of state_bytes: (4, 4), (2, 2), (2, 4).
// Returns 0, or 1 for sizes it does not know.
extern "C" int read4_write3(int64_t count, const int64_t* numel, void* const* param, void* const* grad,
                            void* const* first, void* const* second, int param_bytes, int state_bytes, int64_t threads,
                            uint32_t mask) {
  const Table table{count, numel, param, grad, first, second, mask};
  if (param_bytes == 4 && state_bytes == 4) {
    sweep<uint32_t, uint32_t>(table, threads);
  } else if (param_bytes == 2 && state_bytes == 2) {
    sweep<uint16_t, uint16_t>(table, threads);
  } else if (param_bytes == 2 && state_bytes == 4) {
    sweep<uint16_t, uint32_t>(table, threads);
  } else {
    return 1;
  }
  return 0;
}
