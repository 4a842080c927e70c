// Finds arrays that share memory where one of them is written.
#pragma once
#include <cstdint>
#include <vector>

#include "common/tensor_table.h"

namespace fusedopt {

constexpr int kCounter = -1;  // in the place of a role: the row's step counter

struct Counter {  // a step counter that the launch writes
  void* data;
  int64_t bytes;
};

struct Extent {  // an array's memory: all of [low, high), or some of it if the array has gaps
  uintptr_t low, high;
  int64_t row;  // of the table; of the counters for a counter
  int role;
  bool written, gaps;
};

struct Overlap {
  bool found = false;
  Extent first{}, second{};
};

class OverlapGuard {
 public:
  // `writes` has bit r for a role that is written. A table that passed is remembered: the same one passes at once, and
  // one in which only read arrays moved (new gradients) has only those looked at.
  Overlap check(const TensorTable& table, unsigned writes, const std::vector<Counter>& counters);

 private:
  bool same_but_for_reads(const TensorTable& table, unsigned writes, const std::vector<Counter>& counters) const;
  bool reads_are_clear(const TensorTable& table, unsigned writes) const;
  void remember(const TensorTable& table, const std::vector<Counter>& counters, const std::vector<Extent>& sorted);

  std::vector<TensorRow> rows_;
  std::vector<int64_t> layouts_, block_counts_;
  std::vector<Counter> counters_;
  std::vector<Extent> written_;  // sorted
};

}  // namespace fusedopt
