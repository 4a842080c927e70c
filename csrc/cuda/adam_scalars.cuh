// How a row's scalars travel to a kernel of Adam's family: in the table, or as an address of prepared ones.
#pragma once
#include <cstddef>
#include <cstring>

#include "cuda/adam_scalars.h"

namespace fusedopt::cuda {

template <typename S>
struct ScalarsRecord {
  const PreparedScalars* prepared;  // of the first row; then, for a later one, (row - first) * step behind it
  union {
    AdamWScalars<S> scalars;  // if nothing is prepared
    struct {
      int32_t first, step;
    } rows;
  };
  size_t bytes() const { return prepared ? offsetof(ScalarsRecord, rows) + sizeof rows : sizeof *this; }
  bool serve_rows(int32_t first, int32_t step) {
    rows = {first, step};
    return prepared;
  }
};

struct ScalarsSource {
  const AdamWScalars<double>* scalars;  // host memory; one of the two
  const PreparedScalars* prepared;

  template <typename S>
  ScalarsRecord<S> record(int32_t index) const {
    ScalarsRecord<S> record = {prepared ? prepared + index : nullptr, {}};
    if (!prepared) record.scalars = scalars[index].as<S>();
    return record;
  }
};

// Those of a table's row, from its record; a record that serves one row takes any number. False: the step is to be
// skipped.
template <typename S>
__device__ inline bool read_scalars(const uint64_t* record, int row, AdamWScalars<S>& k) {
  const auto* prepared = reinterpret_cast<const PreparedScalars*>(record[0]);
  if (!prepared) {
    memcpy(&k, record + offsetof(ScalarsRecord<S>, scalars) / sizeof *record, sizeof k);
    return true;
  }
  prepared += int64_t(row - int32_t(record[1])) * int32_t(record[1] >> 32);
  if (prepared->skip) return false;
  k = prepared->scalars.template as<S>();
  return true;
}

}  // namespace fusedopt::cuda
