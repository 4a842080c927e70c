#include "binding/adam_plan.h"

namespace fusedopt {

void AdamPlan::begin(double grad_scale) {
  clear();
  owners_.rewind();
  trail_.rewind();
  inv_grad_scale_ = 1.0 / grad_scale;
}

void AdamPlan::check() {
  owners_.drop_rest();
  builder_.check_overlap();
}

py::list AdamPlan::updated() const {
  py::list params(updated_.size());
  for (size_t i = 0; i < updated_.size(); ++i) PyList_SET_ITEM(params.ptr(), i, Py_NewRef(updated_[i]));
  return params;
}

void AdamPlan::clear() {
  builder_.clear();
  counters_.clear();
  reader_.clear();
  scalars_.clear();
  names_.clear();
  updated_.clear();
  held_.clear();
}

namespace {

bool equal(const AdamWOptions& a, const AdamWOptions& b) {
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.maximize == b.maximize;
}

}  // namespace

// Tensors of the same options and step, as nearly all are, share one entry.
int32_t AdamPlan::scalars_for(const AdamWOptions& options, int64_t step) {
  if (scalars_.empty() || step != last_step_ || !equal(options, last_options_)) {
    scalars_.push_back(generic::adamw_scalars(options, step, inv_grad_scale_));
    last_options_ = options;
    last_step_ = step;
  }
  return int32_t(scalars_.size()) - 1;
}

void AdamPlan::read(Operand* operands, const ArgNames& names, int64_t index, py::object* owned_grad) {
  for (int role = 0; role < roles_; ++role)
    if (operands[role].object) reader_.read(operands[role].object, names.of(role, index), &operands[role].view);
  if (owned_grad && operands[kGrad].view.may_be_lazy() && is_lazy(owned_grad->ptr())) {
    *owned_grad = owned_grad->attr("resolve_conj")().attr("resolve_neg")();
    operands[kGrad].object = owned_grad->ptr();
    reader_.read(owned_grad->ptr(), names.of(kGrad, index), &operands[kGrad].view);
  }
  if (operands[0].view.device.type == dlpack::kCuda)
    throw py::value_error(describe(names.of(0, index), operands[0].object) +
                          ": is on a GPU, but backend 'cpu' takes arrays on the CPU");
}

int64_t AdamPlan::read_step(PyObject* counter, const ArgNames& names, int64_t index) {
  ArrayView view;
  reader_.read(counter, names.of(kCounter, index), &view);
  const int64_t step = counters_.next(counter, view, names.of(kCounter, index));
  builder_.add_counter(view, &names, index);
  return step;
}

void AdamPlan::leave_trail(const Operand* operands, PyObject* counter, PyObject* entry) {
  const PyDictObject* dict = reinterpret_cast<PyDictObject*>(entry);
  trail_.visit(counter);
  trail_.visit(entry);
  trail_.visit(dict->ma_keys);
  trail_.visit(reinterpret_cast<const char*>(dict->ma_keys) + 64);
  for (int role = 0; role < roles_; ++role)
    if (operands[role].object) trail_.visit_tensor(operands[role].object, operands[role].view.shape);
}

void check_adam_dtypes(const Operand* operands, const ArgNames& names, int64_t index, int first_state, int end) {
  const DType param = operands[0].view.dtype;
  for (int role = 0; role < end; ++role) {
    if (!operands[role].object) continue;
    const DType dtype = operands[role].view.dtype;
    const ArgName name = names.of(role, index);
    if (!is_floating(dtype))
      throw py::type_error(describe(name, operands[role].object) + ": expected a floating-point dtype");
    if (role >= first_state && dtype != param && dtype != DType::kFloat32 && dtype != DType::kBFloat16)
      throw py::type_error(describe(name, operands[role].object) + ": a state has the dtype of " +
                           describe(names.of(0, index), operands[0].object) + ", or float32 or bfloat16");
  }
}

}  // namespace fusedopt
