// How a row's scalars travel to a kernel of Adam's family: in the table, or as an address of prepared ones.
#pragma once
#include <cstddef>
#include <cstring>

#include "cuda/adam_scalars.h"
#include "cuda/elementwise.cuh"

namespace fusedopt::cuda {

template <typename S>
struct ScalarsRecord {
  const PreparedScalars* prepared;
  AdamWScalars<S> scalars;  // if nothing is prepared
  size_t bytes() const { return prepared ? sizeof prepared : sizeof *this; }
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

// What each row of AdamW's carries of its own, so that tensors with numbers of their own take no more launches.
enum class OwnNumbers {
  kNone,      // neighbours share a record mostly
  kRates,     // rate and decay: each tensor has its lr or weight_decay
  kSteps,     // and inv_sqrt_c2: its step too
  kPrepared,  // an int32, which of the prepared scalars
};

inline OwnNumbers own_numbers(const ScalarsSource& source, const TensorTable& table) {
  constexpr int64_t kFewRecords = 8;
  if (source.prepared) return OwnNumbers::kPrepared;
  int64_t rates = 0, steps = 0;  // rows that differ from the one before
  for (int64_t i = 1; i < table.size; ++i) {
    const int32_t last = table.rows[i - 1].scalars, own = table.rows[i].scalars;
    rates += last != own;
    steps += source.scalars[last].inv_sqrt_c2 != source.scalars[own].inv_sqrt_c2;
  }
  return rates < kFewRecords ? OwnNumbers::kNone : steps < kFewRecords ? OwnNumbers::kRates : OwnNumbers::kSteps;
}

// Whether rows of these scalars differ in nothing but their own numbers.
inline bool share_record(const AdamWScalars<double>& a, const AdamWScalars<double>& b, OwnNumbers own) {
  return own != OwnNumbers::kNone && a.lerp_weight == b.lerp_weight && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.grad_weight == b.grad_weight && a.grad_factor == b.grad_factor && a.lerp_from_grad == b.lerp_from_grad &&
         (own == OwnNumbers::kSteps || a.inv_sqrt_c2 == b.inv_sqrt_c2);
}

// From a record's words; `index` counts from its prepared scalars. False: the step is to be skipped.
template <typename S>
__device__ inline bool read_scalars(const uint64_t* record, int index, AdamWScalars<S>& k) {
  const auto* prepared = reinterpret_cast<const PreparedScalars*>(record[0]);
  if (!prepared) {
    memcpy(&k, record + offsetof(ScalarsRecord<S>, scalars) / sizeof *record, sizeof k);
    return true;
  }
  if (prepared[index].skip) return false;
  k = prepared[index].scalars.template as<S>();
  return true;
}

}  // namespace fusedopt::cuda
