// Step counters on the host: one-element arrays that hold the number of steps taken.
#pragma once
#include <vector>

#include "binding/arrays.h"

namespace fusedopt {

// Throws unless this is a writable number of a dtype that counts, on whatever device.
void check_counter(PyObject* object, const ArrayView& counter, const ArgName& name);

class StepCounters {
 public:
  void clear() { pending_.clear(); }
  // The number of the step about to be taken, read from its counter plus one. Throws if it is no whole number >= 0.
  int64_t next(PyObject* object, const ArrayView& counter, const ArgName& name);
  // Writes the numbers that next() gave.
  void commit();

 private:
  struct Pending {
    void* data;
    DType dtype;
    int64_t value;
  };
  std::vector<Pending> pending_;
};

}  // namespace fusedopt
