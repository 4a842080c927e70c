// AdamW's side of the binding: names the arrays and their keys, and launches.
#include "binding/adamw.h"

#include "binding/adam_plan.h"
#include "binding/gpu.h"
#include "binding/packed.h"
#include "cpu/launch.h"

namespace fusedopt {
namespace {

using Role = AdamWRole;
constexpr unsigned kWrites =
    1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kExpAvgSq | 1u << Role::kMaxExpAvgSq;

class AdamWPlan : public AdamPlan {
 public:
  AdamWPlan() : AdamPlan(Role::kCount, kWrites) {}

  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avgs,
                 const py::sequence& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::object& step,
                 const py::list& lr, const py::list& weight_decay, double beta1, double beta2, double eps,
                 bool maximize) {
    ArgNames& names = names_.emplace_back();
    names.roles = {{"params", ""}, {"grads", ""}, {"exp_avgs", ""}, {"exp_avg_sqs", ""}, {"max_exp_avg_sqs", ""}};
    names.counter = {"step", ""};
    std::vector<py::sequence> lists = {params, grads, exp_avgs, exp_avg_sqs};
    if (!max_exp_avg_sqs.is_none()) lists.push_back(max_exp_avg_sqs);
    const std::vector<Number> rates = numbers(lr, "lr"), decays = numbers(weight_decay, "weight_decay");
    walk_lists(
        names, lists, step,
        [&](Operand* operands, int64_t i, const Step& t) {
          Options options(of(rates, i), of(decays, i), beta1, beta2, eps, maximize);
          add(operands, &names, i, options, t);
        },
        [&](Operand* operands, int64_t i) {  // refused, as any object that is no array
          read(operands[Role::kGrad].object, names.of(Role::kGrad, i), &operands[Role::kGrad].view);
        });
  }

  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::object& lr,
                     const py::object& weight_decay, double beta1, double beta2, double eps, bool amsgrad,
                     bool maximize) {
    ArgNames& names = names_.emplace_back();
    const std::string prefix = "param_groups[" + std::to_string(group) + "]['params']";
    names.roles = {{prefix, ""},
                   {prefix, ".grad"},
                   {prefix, "'s state 'exp_avg'"},
                   {prefix, "'s state 'exp_avg_sq'"},
                   {prefix, "'s state 'max_exp_avg_sq'"}};
    names.counter = {prefix, "'s state 'step'"};
    static const std::vector<StateKey> with_maxima = {
        {PyUnicode_InternFromString("step"), kCounter},
        {PyUnicode_InternFromString("exp_avg"), Role::kExpAvg},
        {PyUnicode_InternFromString("exp_avg_sq"), Role::kExpAvgSq},
        {PyUnicode_InternFromString("max_exp_avg_sq"), Role::kMaxExpAvgSq}};
    static const std::vector<StateKey> without(with_maxima.begin(), with_maxima.end() - 1);
    const Number& rate = numbers_.emplace_back(lr, "lr", true);
    const Number& decay = numbers_.emplace_back(weight_decay, "weight_decay", true);
    Options options(rate, decay, beta1, beta2, eps, maximize);
    return walk_group(
        names, params, state, amsgrad ? with_maxima : without,
        [&](Operand* operands, int64_t i, const Step& t) { add(operands, &names, i, options, t); },
        [](PyObject*, int64_t) {});
  }

  int64_t workspace_bytes(int32_t gpu) override {
    const AdamGpuRows& rows = gpu_rows(gpu);
    if constexpr (kWithCuda)
      if (rows.reads_device(loss_scale_on(rows.device)))
        return cuda::adamw_workspace_bytes(int64_t(rows.options().size()));
    return 0;
  }
  void launch_gpu(int32_t gpu, uintptr_t stream_address, uintptr_t workspace_address) override {
    const AdamGpuRows& rows = gpu_rows(gpu);
    const TensorTable table = rows.table.table();
    const cuda::AdamWLossScale loss_scale = loss_scale_on(rows.device);
    const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
    const auto workspace = reinterpret_cast<void*>(workspace_address);
    if (!rows.reads_device(loss_scale)) {
      const std::vector<AdamWScalars<double>> scalars = rows.host_scalars(loss_scale);
      return launch_on_gpu(gpu, [&] { return cuda::launch_adamw(table, scalars.data(), stream); });
    }
    rows.check_workspace(workspace);
    launch_on_gpu(gpu, [&] {
      return cuda::launch_adamw_capturable(table, rows.options().data(), int64_t(rows.options().size()),
                                           rows.counters().data(), int64_t(rows.counters().size()), loss_scale,
                                           workspace, stream);
    });
  }
  void launch(int threads) override {
    counters_.commit();
    const TensorTable table = builder_.table();
    py::gil_scoped_release release;
    cpu::launch_adamw(table, scalars_.data(), threads);
  }

  // For launches from Python: rows, layouts and numbers as arrays. On the CPU it counts the step, as launch() does.
  py::tuple packed(int32_t gpu) {
    const AdamGpuRows& rows = gpu_rows(gpu);
    return rows.packed(loss_scale_on(rows.device));
  }
  py::tuple packed_on_cpu() {
    counters_.commit();
    const TensorTable table = builder_.table();
    return py::make_tuple(packed_rows(table), packed_layouts(table), packed_scalars(scalars_));
  }

 private:
  void add(const Operand* operands, const ArgNames* names, int64_t index, Options& options, const Step& step) {
    check_adam_dtypes(operands, *names, index, Role::kExpAvg, Role::kCount);
    add_row(operands, names, index, options, step);
  }
};

}  // namespace

void bind_adamw(py::module_& module) {
  using namespace py::literals;
  py::class_<AdamWPlan, AdamPlan>(module, "AdamWPlan")
      .def(py::init())
      .def("add_lists", &AdamWPlan::add_lists, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a,
           "max_exp_avg_sqs"_a, "step"_a, "lr"_a, "weight_decay"_a, "beta1"_a, "beta2"_a, "eps"_a, "maximize"_a)
      .def("add_group", &AdamWPlan::add_group, "group"_a, "params"_a, "state"_a, "lr"_a, "weight_decay"_a, "beta1"_a,
           "beta2"_a, "eps"_a, "amsgrad"_a, "maximize"_a)
      .def("packed", &AdamWPlan::packed, "gpu"_a)
      .def("packed_on_cpu", &AdamWPlan::packed_on_cpu);
}

}  // namespace fusedopt
