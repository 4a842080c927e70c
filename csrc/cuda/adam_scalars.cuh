// How a row's scalars travel to a kernel of Adam's family: in the table, or as an address of prepared ones.
#pragma once
#include <cstddef>
#include <cstring>

#include "cuda/adam_scalars.h"

namespace fusedopt::cuda {

template <typename S>
struct ScalarsRecord {
  const PreparedScalars* prepared;
  AdamWScalars<S> scalars;  // sent if nothing is prepared
  size_t bytes() const { return prepared ? sizeof prepared : sizeof *this; }
};

struct ScalarsSource {
  const AdamWScalars<double>* scalars;  // host memory; one of the two
  const PreparedScalars* prepared;

  template <typename S>
  ScalarsRecord<S> record(int32_t index) const {
    if (prepared) return {prepared + index, {}};
    return {nullptr, scalars[index].as<S>()};
  }
};

// False: the step is to be skipped.
template <typename S>
__device__ inline bool read_scalars(const uint64_t* record, AdamWScalars<S>& k) {
  const auto* prepared = reinterpret_cast<const PreparedScalars*>(record[0]);
  if (!prepared) {
    memcpy(&k, record + offsetof(ScalarsRecord<S>, scalars) / sizeof *record, sizeof k);
    return true;
  }
  if (prepared->skip) return false;
  k = prepared->scalars.template as<S>();
  return true;
}

}  // namespace fusedopt::cuda
