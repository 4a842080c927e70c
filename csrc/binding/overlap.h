// Finds arrays that share memory where one of them is written.
#pragma once
#include <cstdint>
#include <utility>
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
  int table;  // of two tables, which
};

struct Overlap {
  bool found = false;
  Extent first{}, second{};
};

class OverlapGuard {
 public:
  struct Arrays {
    const TensorTable& table;
    unsigned writes;  // has bit r for a role that is written
    const std::vector<Counter>& counters;
  };

  // A table that passed is remembered: the same one passes at once, and one in which only read arrays moved (new
  // gradients) has only those looked at.
  Overlap check(const Arrays& arrays);
  // Two tables together, each of which has just passed its own guard; remembered likewise.
  Overlap check_beside(const Arrays& own, const OverlapGuard& other, const Arrays& others);

 private:
  bool same_but_for_reads(const Arrays& arrays) const;
  void remember(const Arrays& arrays, const std::vector<Extent>& sorted);

  std::vector<TensorRow> rows_;
  std::vector<int64_t> layouts_, block_counts_;
  std::vector<Counter> counters_;
  std::vector<Extent> written_;         // sorted
  int64_t version_ = 0;                 // how often a table has been remembered
  std::pair<int64_t, int64_t> beside_;  // own version and the other's when two passed together
};

}  // namespace fusedopt
