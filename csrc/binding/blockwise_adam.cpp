// Blockwise Adam's side of the binding: reads the arrays and partitions, packs the table with its scalars, and
// launches.
#include "binding/blockwise_adam.h"

#include <pybind11/stl.h>

#include "binding/adam_plan.h"
#include "cpu/launch.h"
#include "math/blockwise_adam.h"

namespace fusedopt {
namespace {

using Role = BlockwiseAdamRole;
constexpr unsigned kWrites = 1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kBlockSq;

class BlockwiseAdamPlan : public AdamPlan {
 public:
  explicit BlockwiseAdamPlan(py::object resolve)
      : AdamPlan(Role::kCount, kWrites, true), blocks_of_(std::move(resolve)) {}

  void begin(double grad_scale) {
    AdamPlan::begin(grad_scale);
    blocks_of_.rewind();
    globals_.clear();
    copies_.clear();
    lists_ = 0;
  }

  // Global partitions of one call share a block, those of another call another.
  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                 const py::sequence& block_sqs, const py::list& partitions, const py::object& step,
                 const std::vector<double>& lr, const std::vector<double>& weight_decay, double beta1, double beta2,
                 double eps, bool maximize) {
    ArgNames& names = names_.emplace_back();
    names.roles = {{"params", ""}, {"grads", ""}, {"exp_avgs", ""}, {"block_sqs", ""}};
    names.counter = {"step", ""};
    walk_lists(
        names, {params, grads, exp_avgs, block_sqs}, step,
        [&](Operand* operands, int64_t i, int64_t t) {
          const AdamWOptions options = {
              lr[lr.size() > 1 ? i : 0], beta1, beta2, eps, weight_decay[weight_decay.size() > 1 ? i : 0], maximize};
          add_row(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), options, t);
        },
        [&](const Operand* operands, int64_t i) {
          if (is_global(PyList_GET_ITEM(partitions.ptr(), i))) add_absent(operands[Role::kBlockSq].object, &names, i);
        });
    ++lists_;
  }

  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::list& partitions,
                     double lr, double weight_decay, double beta1, double beta2, double eps, bool maximize) {
    ArgNames& names = names_.emplace_back();
    const std::string prefix = "param_groups[" + std::to_string(group) + "]['params']";
    names.roles = {{prefix, ""}, {prefix, ".grad"}, {prefix, "'s state 'exp_avg'"}, {prefix, "'s state 'block_sq'"}};
    names.counter = {prefix, "'s state 'step'"};
    if (partitions.size() != params.size())
      throw py::value_error("param_groups[" + std::to_string(group) + "] has " + std::to_string(params.size()) +
                            " parameters, but 'partition' has " + std::to_string(partitions.size()) +
                            " entries: add parameters by add_param_group");
    static const std::vector<StateKey> keys = {{PyUnicode_InternFromString("step"), kCounter},
                                               {PyUnicode_InternFromString("exp_avg"), Role::kExpAvg},
                                               {PyUnicode_InternFromString("block_sq"), Role::kBlockSq}};
    const AdamWOptions options = {lr, beta1, beta2, eps, weight_decay, maximize};
    py::list missing = walk_group(
        names, params, state, keys,
        [&](Operand* operands, int64_t i, int64_t t) {
          add_row(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), options, t);
        },
        [&](PyObject* entry, int64_t i) {
          if (!is_global(PyList_GET_ITEM(partitions.ptr(), i))) return;
          PyObject* block_sq = DictCursor(entry).find(keys.back().key);
          if (!block_sq) throw py::key_error(names.of(Role::kBlockSq, i).str() + " is missing");
          add_absent(block_sq, &names, i);
        });
    ++lists_;
    return missing;
  }

  // Counts the step and updates everything added. Nothing has been written before; nothing can fail after.
  void launch(int threads) {
    const TensorTable table = builder_.table();
    workspace_.resize(cpu::blockwise_adam_workspace_bytes(table) / sizeof(double));
    counters_.commit();
    py::gil_scoped_release release;
    cpu::launch_blockwise_adam(table, scalars_.data(), workspace_.data(), threads);
    for (const auto& [value, block] : copies_)
      if (globals_[block].updated) *value = *globals_[block].updated;
  }

 private:
  struct Global {  // a block over all tensors of one list or group; each of them holds its value
    int64_t list;
    float *value, *updated;  // one tensor's copy, and that of one that has a gradient (nullptr: none has)
  };

  // The copies must be equal before the step; after it they are again, gradient or not.
  void add_global(const Operand& block_sq, const ArgNames* names, int64_t index, bool has_gradient) {
    const ArgName name = names->of(Role::kBlockSq, index);
    if (block_sq.view.dtype != DType::kFloat32 || block_sq.view.numel() != 1)
      throw py::value_error(describe(name, block_sq.object) + ": partition 'global' wants one float32");
    float* const value = static_cast<float*>(block_sq.view.data);
    if (globals_.empty() || globals_.back().list != lists_) globals_.push_back({lists_, value, nullptr});
    Global& global = globals_.back();
    if (memcmp(value, global.value, sizeof *value) != 0)
      throw py::value_error(describe(name, block_sq.object) + ": is " + std::to_string(*value) + ", but is " +
                            std::to_string(*global.value) + " in another tensor of the same 'global' block");
    if (has_gradient) {
      global.updated = value;
      return;
    }
    copies_.emplace_back(value, globals_.size() - 1);
    builder_.add_value(block_sq.view, names, index, Role::kBlockSq);
  }

  void add_absent(PyObject* block_sq, const ArgNames* names, int64_t index) {
    Operand operand = {block_sq, {}};
    read(block_sq, names->of(Role::kBlockSq, index), &operand.view);
    add_global(operand, names, index, false);
  }

  void add_row(const Operand* operands, const ArgNames* names, int64_t index, PyObject* partition,
               const AdamWOptions& options, int64_t step) {
    for (int role = 0; role < Role::kCount; ++role)
      if (operands[role].view.complex)
        throw py::type_error(describe(names->of(role, index), operands[role].object) +
                             ": complex numbers have no place in a block; pass torch.view_as_real(x) or x.view(float)");
    check_adam_dtypes(operands, *names, index, Role::kExpAvg, Role::kBlockSq);
    if (operands[Role::kBlockSq].view.dtype != DType::kFloat32)
      throw py::type_error(describe(names->of(Role::kBlockSq, index), operands[Role::kBlockSq].object) +
                           ": second moments of blocks are float32");
    const Blocks& blocks = blocks_of_.next(partition, operands[0].view, names->of(0, index));
    if (blocks.global) add_global(operands[Role::kBlockSq], names, index, operands[0].view.numel() > 0);
    builder_.add(operands, names, index, scalars_for(options, step), &blocks, lists_);
  }

  BlockResolver blocks_of_;
  std::vector<Global> globals_;
  std::vector<std::pair<float*, size_t>> copies_;  // in tensors without a gradient, and whose
  int64_t lists_ = 0;                              // lists and groups added so far
  std::vector<double> workspace_;
};

}  // namespace

void bind_blockwise_adam(py::module_& module) {
  using namespace py::literals;
  py::class_<BlockwiseAdamPlan>(module, "BlockwiseAdamPlan")
      .def(py::init<py::object>(), "resolve"_a)
      .def("begin", &BlockwiseAdamPlan::begin, "grad_scale"_a)
      .def("add_lists", &BlockwiseAdamPlan::add_lists, "params"_a, "grads"_a, "exp_avgs"_a, "block_sqs"_a,
           "partitions"_a, "step"_a, "lr"_a, "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("add_group", &BlockwiseAdamPlan::add_group, "group"_a, "params"_a, "state"_a, "partitions"_a, "lr"_a,
           "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("check", &BlockwiseAdamPlan::check)
      .def("updated", &BlockwiseAdamPlan::updated)
      .def("launch", &BlockwiseAdamPlan::launch, "threads"_a)
      .def("clear", &BlockwiseAdamPlan::clear);
}

}  // namespace fusedopt
