// Blockwise Adam's side of the binding: names the arrays and their keys, asks partitions for blocks, and launches.
#include "binding/blockwise_adam.h"

#include "binding/adam_plan.h"
#include "binding/gpu.h"
#include "binding/packed.h"
#include "binding/resolver.h"
#include "cpu/launch.h"
#include "cuda/blockwise_adam.h"
#include "math/blockwise_adam.h"

namespace fusedopt {
namespace {

using Role = BlockwiseAdamRole;
constexpr unsigned kWrites = 1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kBlockSq;

class BlockwiseAdamPlan : public AdamPlan {
 public:
  explicit BlockwiseAdamPlan(py::object resolve)
      : AdamPlan(Role::kCount, kWrites, true), blocks_of_(std::move(resolve), blocks_of) {}

  void begin(const py::object& grad_scale, const py::object& found_inf, const py::object& stream,
             bool movable) override {
    AdamPlan::begin(grad_scale, found_inf, stream, movable);
    blocks_of_.rewind();
    globals_.clear();
    copies_.clear();
    lists_ = 0;
  }

  // Global partitions of one call share a block, those of another call another.
  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                 const py::sequence& block_sqs, const py::list& partitions, const py::object& step, const py::list& lr,
                 const py::list& weight_decay, double beta1, double beta2, double eps, bool maximize) {
    ArgNames& names = names_.emplace_back();
    names.roles = {{"params", ""}, {"grads", ""}, {"exp_avgs", ""}, {"block_sqs", ""}};
    names.counter = {"step", ""};
    const std::vector<Number> rates = numbers(lr, "lr"), decays = numbers(weight_decay, "weight_decay");
    walk_lists(
        names, {params, grads, exp_avgs, block_sqs}, step,
        [&](const Operand* operands, int64_t i, const Step& t) {
          Options options(of(rates, i), of(decays, i), beta1, beta2, eps, maximize);
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), options, t);
        },
        [&](const Operand* operands, int64_t i) {
          if (is_global(PyList_GET_ITEM(partitions.ptr(), i))) add_absent(operands[Role::kBlockSq].object, &names, i);
        });
    ++lists_;
  }

  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::list& partitions,
                     const py::object& lr, const py::object& weight_decay, double beta1, double beta2, double eps,
                     bool maximize) {
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
    const Number& rate = numbers_.emplace_back(lr, "lr", true);
    const Number& decay = numbers_.emplace_back(weight_decay, "weight_decay", true);
    Options options(rate, decay, beta1, beta2, eps, maximize);
    py::list missing = walk_group(
        names, params, state, keys,
        [&](const Operand* operands, int64_t i, const Step& t) {
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), options, t);
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

  int64_t workspace_bytes(int32_t gpu) override {
    const AdamGpuRows& rows = gpu_rows(gpu);
    if constexpr (kWithCuda)
      return cuda::blockwise_adam_workspace_bytes(
          rows.table.table(), rows.reads_device(loss_scale_on(rows.device)) ? int64_t(rows.options().size()) : 0);
    return 0;
  }
  void launch_gpu(int32_t gpu, uintptr_t stream_address, uintptr_t workspace_address) override {
    const AdamGpuRows& rows = gpu_rows(gpu);
    const TensorTable table = rows.table.table();
    const cuda::AdamWLossScale loss_scale = loss_scale_on(rows.device);
    const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
    const auto workspace = reinterpret_cast<void*>(workspace_address);
    const std::vector<cuda::BlockCopy> copies = copies_on([&](dlpack::Device device) { return device == rows.device; });
    const cuda::BlockCopies values = {copies.data(), int64_t(copies.size())};
    if (workspace_bytes(gpu) > 0) rows.check_workspace(workspace);
    if (!rows.reads_device(loss_scale)) {
      const std::vector<AdamWScalars<double>> scalars = rows.host_scalars(loss_scale);
      return launch_on_gpu(
          gpu, [&] { return cuda::launch_blockwise_adam(table, scalars.data(), values, workspace, stream); });
    }
    launch_on_gpu(gpu, [&] {
      return cuda::launch_blockwise_adam_capturable(table, rows.options().data(), int64_t(rows.options().size()),
                                                    rows.counters().data(), int64_t(rows.counters().size()), loss_scale,
                                                    values, workspace, stream);
    });
  }
  void launch(int threads) override {
    const TensorTable table = builder_.table();
    workspace_.resize(cpu::blockwise_adam_workspace_bytes(table) / sizeof(double));
    counters_.commit();
    py::gil_scoped_release release;
    cpu::launch_blockwise_adam(table, scalars_.data(), workspace_.data(), threads);
    for (const Copy& copy : copies_) {
      const Global& global = globals_[copy.global];
      if (!on_gpu(global.device) && global.updated) *copy.value = *global.updated;
    }
  }

  // For launches from Python: regions and copies, then what AdamW's plan gives. On the CPU it counts the step.
  py::tuple packed(int32_t gpu) {
    const AdamGpuRows& rows = gpu_rows(gpu);
    return packed_blocks(rows.table.table(), [&](dlpack::Device device) { return device == rows.device; }) +
           rows.packed(loss_scale_on(rows.device));
  }
  py::tuple packed_on_cpu() {
    counters_.commit();
    const TensorTable table = builder_.table();
    return packed_blocks(table, [](dlpack::Device device) { return !on_gpu(device); }) +
           py::make_tuple(packed_rows(table), packed_layouts(table), packed_scalars(scalars_));
  }

 private:
  struct Global {  // a block over all tensors of one list or group; each of them holds its value
    int64_t list;
    dlpack::Device device;
    float *value, *updated;  // one tensor's copy, and that of one that has a gradient (nullptr: none has)
  };
  struct Copy {  // the value that a tensor without a gradient holds
    float* value;
    size_t global;
  };

  static bool on_gpu(dlpack::Device device) { return device.type == dlpack::kCuda; }

  template <typename Here>
  std::vector<cuda::BlockCopy> copies_on(Here here) const {
    std::vector<cuda::BlockCopy> copies;
    for (const Copy& copy : copies_) {
      const Global& global = globals_[copy.global];
      if (here(global.device) && global.updated) copies.push_back({copy.value, global.list});
    }
    return copies;
  }

  template <typename Here>
  py::tuple packed_blocks(const TensorTable& table, Here here) const {
    PackedWords copies;
    for (const cuda::BlockCopy& copy : copies_on(here)) {
      copies.add(int64_t(reinterpret_cast<uintptr_t>(copy.value)));
      copies.add(copy.shared);
    }
    return py::make_tuple(packed_regions(table), copies.array());
  }

  // On the CPU the copies must be equal before the step; after it they are again, gradient or not.
  void add_global(const Operand& block_sq, const ArgNames* names, int64_t index, bool has_gradient) {
    const ArgName name = names->of(Role::kBlockSq, index);
    const ArrayView& view = block_sq.view;
    if (view.dtype != DType::kFloat32 || view.numel() != 1)
      throw py::value_error(describe(name, block_sq.object) + ": partition 'global' wants one float32");
    float* const value = static_cast<float*>(view.data);
    if (globals_.empty() || globals_.back().list != lists_) globals_.push_back({lists_, view.device, value, nullptr});
    Global& global = globals_.back();
    if (!(view.device == global.device))
      throw py::value_error(describe(name, block_sq.object) + ": is on " + device_string(view.device) +
                            ", but another tensor of the same 'global' block on " + device_string(global.device));
    if (!on_gpu(view.device) && memcmp(value, global.value, sizeof *value) != 0)
      throw py::value_error(describe(name, block_sq.object) + ": is " + std::to_string(*value) + ", but is " +
                            std::to_string(*global.value) + " in another tensor of the same 'global' block");
    if (has_gradient) {
      global.updated = value;
      return;
    }
    copies_.push_back({value, globals_.size() - 1});
    table_on(view.device).add_value(view, names, index, Role::kBlockSq);
  }

  TableBuilder& table_on(dlpack::Device device) { return on_gpu(device) ? gpu_rows(device).table : builder_; }

  void add_absent(PyObject* block_sq, const ArgNames* names, int64_t index) {
    Operand operand = {block_sq, {}};
    read(block_sq, names->of(Role::kBlockSq, index), &operand.view);
    add_global(operand, names, index, false);
  }

  void add(const Operand* operands, const ArgNames* names, int64_t index, PyObject* partition, Options& options,
           const Step& step) {
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
    add_row(operands, names, index, options, step, &blocks, lists_);
  }

  Resolver<Blocks> blocks_of_;
  std::vector<Global> globals_;
  std::vector<Copy> copies_;
  int64_t lists_ = 0;  // lists and groups added so far
  std::vector<double> workspace_;
};

}  // namespace

void bind_blockwise_adam(py::module_& module) {
  using namespace py::literals;
  py::class_<BlockwiseAdamPlan, AdamPlan>(module, "BlockwiseAdamPlan")
      .def(py::init<py::object>(), "resolve"_a)
      .def("add_lists", &BlockwiseAdamPlan::add_lists, "params"_a, "grads"_a, "exp_avgs"_a, "block_sqs"_a,
           "partitions"_a, "step"_a, "lr"_a, "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("add_group", &BlockwiseAdamPlan::add_group, "group"_a, "params"_a, "state"_a, "partitions"_a, "lr"_a,
           "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("packed", &BlockwiseAdamPlan::packed, "gpu"_a)
      .def("packed_on_cpu", &BlockwiseAdamPlan::packed_on_cpu);
}

}  // namespace fusedopt
