// The order in which threads and thread blocks run, by CUDA_HOST_SEED. Whatever two threads may do
// in either order, seeds 0 and 1 do in both; other seeds shuffle, anew for every round.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "machine.h"

namespace cuda_host {

struct Random {  // SplitMix64
  using result_type = uint64_t;
  uint64_t state;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t(0); }
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
};

class Order {
 public:
  explicit Order(int warp_count) {
    const char* text = std::getenv("CUDA_HOST_SEED");
    seed_ = text ? std::strtoull(text, nullptr, 10) : kAscending;
    random_.state = seed_;
    warps = first(warp_count);
    lanes = first(kWarpSize);
  }
  template <typename T>
  std::vector<T> first(T count) {
    std::vector<T> numbers(count);
    std::iota(numbers.begin(), numbers.end(), T(0));
    if (seed_ == kDescending) std::reverse(numbers.begin(), numbers.end());
    return numbers;
  }
  template <typename T>
  std::vector<T>& next_round(std::vector<T>& items) {
    if (seed_ > kDescending) std::shuffle(items.begin(), items.end(), random_);
    return items;
  }
  // Whether a warp, or a block, that could go on lets others run first.
  bool preempts() { return seed_ > kDescending && random_() % 2; }

  std::vector<int> warps, lanes;

 private:
  static constexpr uint64_t kAscending = 0, kDescending = 1;
  uint64_t seed_;
  Random random_;
};

}  // namespace cuda_host
