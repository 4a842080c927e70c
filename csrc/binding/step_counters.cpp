#include "binding/step_counters.h"

#include "binding/numbers.h"

namespace fusedopt {
namespace {

double value_of(const ArrayView& counter) {
  switch (counter.dtype) {
    case DType::kFloat32: return *static_cast<const float*>(counter.data);
    case DType::kFloat64: return *static_cast<const double*>(counter.data);
    case DType::kInt32: return *static_cast<const int32_t*>(counter.data);
    case DType::kInt64: return double(*static_cast<const int64_t*>(counter.data));
    default: return -1;
  }
}

}  // namespace

void check_counter(PyObject* object, const ArrayView& counter, const ArgName& name) {
  check_number(object, counter, name, "a step counter");
  if (counter.read_only) throw py::value_error(describe(name, object) + ": is read-only");
}

int64_t StepCounters::next(PyObject* object, const ArrayView& counter, const ArgName& name) {
  check_counter(object, counter, name);
  const double value = value_of(counter);
  if (!(value >= 0 && value < 9e15) || double(int64_t(value)) != value)
    throw py::value_error(name.str() + " is " + std::to_string(value) + ", expected a whole number >= 0");
  const int64_t step = int64_t(value) + 1;
  pending_.push_back({counter.data, counter.dtype, step});
  return step;
}

void StepCounters::commit() {
  for (const Pending& p : pending_) switch (p.dtype) {
      case DType::kFloat32: *static_cast<float*>(p.data) = float(p.value); break;
      case DType::kFloat64: *static_cast<double*>(p.data) = double(p.value); break;
      case DType::kInt32: *static_cast<int32_t*>(p.data) = int32_t(p.value); break;
      default: *static_cast<int64_t*>(p.data) = p.value;
    }
  pending_.clear();
}

}  // namespace fusedopt
