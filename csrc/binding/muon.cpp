// Muon's side of the binding: reads the arrays and partitions, packs the table, the matrices in it and their scalars,
// and launches. NorMuon is Muon with one more state.
#include "binding/muon.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "binding/adam_plan.h"
#include "binding/gpu.h"
#include "binding/packed.h"
#include "binding/resolver.h"
#include "cpu/muon.h"
#include "cuda/muon.h"

namespace fusedopt {
namespace {

using Role = MuonRole;
constexpr unsigned kWrites = 1u << Role::kParam | 1u << Role::kMomentum | 1u << Role::kRowSq;

struct Piece {  // of a tensor, in row-major order; transposed: its outputs run along the columns
  int64_t offset, rows, columns, stride;
  bool transposed;
};

std::vector<Piece> pieces_of(py::handle, const py::object& matrices) {
  std::vector<Piece> pieces;
  for (const py::handle entry : matrices) {
    const auto m = py::reinterpret_borrow<py::sequence>(entry);
    pieces.push_back(
        {m[0].cast<int64_t>(), m[1].cast<int64_t>(), m[2].cast<int64_t>(), m[3].cast<int64_t>(), m[4].cast<bool>()});
  }
  return pieces;
}

MuonScale scale_of(const std::string& name) {
  if (name == "original") return MuonScale::kOriginal;
  if (name == "match_rms_adamw" || name == "rms_norm") return MuonScale::kMatchRmsAdamW;
  if (name == "spectral") return MuonScale::kSpectral;
  return MuonScale::kNone;
}

using Schedules = std::pair<NewtonSchulzSchedule, NewtonSchulzSchedule>;  // the second for parameters of float64

bool same(const NewtonSchulzSchedule& a, const NewtonSchulzSchedule& b) {
  return a.gram_from == b.gram_from && a.dtype == b.dtype && a.arithmetic == b.arithmetic &&
         a.steps.size() == b.steps.size() &&
         std::equal(a.steps.begin(), a.steps.end(), b.steps.begin(),
                    [](const NewtonSchulzStep& x, const NewtonSchulzStep& y) {
                      return x.a == y.a && x.b == y.b && x.c == y.c && x.restart_before == y.restart_before;
                    });
}

// How one list or group is stepped, beside the numbers that may lie on a GPU.
struct Rule {
  bool nesterov, sum_form, maximize, cautious;
  MuonScale scale;
  double beta2;
  bool short_axis;
  Schedules on_cpu, on_gpu;
};

Rule rule_of(const py::dict& options) {
  const auto get = [&](const char* key) { return options[key]; };
  return {get("nesterov").cast<bool>(),
          get("sum_form").cast<bool>(),
          get("maximize").cast<bool>(),
          get("cautious_weight_decay").cast<bool>(),
          scale_of(get("adjust_lr_fn").cast<std::string>()),
          get("beta2").cast<double>(),
          get("axis").cast<std::string>() == "short",
          get("cpu_schedules").cast<Schedules>(),
          get("gpu_schedules").cast<Schedules>()};
}

struct Numbers {  // one tensor's that may lie on a GPU
  const Number &lr, &weight_decay, &momentum;
};

bool equal(const cuda::MuonDeviceOptions& a, const cuda::MuonDeviceOptions& b) {
  return a.options == b.options && a.lr.data == b.lr.data && a.weight_decay.data == b.weight_decay.data &&
         a.momentum.data == b.momentum.data;
}

class MuonPlan : public AdamPlan {
 public:
  MuonPlan(py::object resolve, bool normuon)
      : AdamPlan(normuon ? Role::kCount : Role::kRowSq, kWrites, normuon, true),
        normuon_(normuon),
        pieces_of_(std::move(resolve), pieces_of) {}

  void begin(const py::object& grad_scale, const py::object& found_inf, const py::object& stream,
             bool movable) override {
    AdamPlan::begin(grad_scale, found_inf, stream, movable);
    pieces_of_.rewind();
    rows_.clear();
  }

  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& momentum_buffers,
                 const py::object& row_sqs, const py::list& partitions, const py::list& lr,
                 const py::list& weight_decay, const py::object& momentum, const py::dict& options) {
    ArgNames& names = names_.emplace_back();
    names.roles = {{"params", ""}, {"grads", ""}, {"momentum_buffers", ""}, {"row_sqs", ""}};
    std::vector<py::sequence> lists = {params, grads, momentum_buffers};
    if (normuon_) lists.push_back(row_sqs);
    const Rule rule = rule_of(options);
    const std::vector<Number> rates = numbers(lr, "lr"), decays = numbers(weight_decay, "weight_decay");
    const Number mu(momentum, "momentum", false);
    walk_lists(
        names, lists, py::int_(0),
        [&](const Operand* operands, int64_t i, const Step&) {
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), {of(rates, i), of(decays, i), mu}, rule);
        },
        [](const Operand*, int64_t) {});
  }

  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::list& partitions,
                     const py::object& lr, const py::object& weight_decay, const py::object& momentum,
                     const py::dict& options) {
    ArgNames& names = names_.emplace_back();
    const std::string prefix = "param_groups[" + std::to_string(group) + "]['params']";
    names.roles = {
        {prefix, ""}, {prefix, ".grad"}, {prefix, "'s state 'momentum_buffer'"}, {prefix, "'s state 'row_sq'"}};
    if (partitions.size() != params.size())
      throw py::value_error("param_groups[" + std::to_string(group) + "] has " + std::to_string(params.size()) +
                            " parameters, but 'partition' has " + std::to_string(partitions.size()) +
                            " entries: add parameters by add_param_group");
    static const std::vector<StateKey> muon = {{PyUnicode_InternFromString("momentum_buffer"), Role::kMomentum}};
    static const std::vector<StateKey> normuon = {muon[0], {PyUnicode_InternFromString("row_sq"), Role::kRowSq}};
    const Rule rule = rule_of(options);
    const Numbers numbers = {numbers_.emplace_back(lr, "lr", true),
                             numbers_.emplace_back(weight_decay, "weight_decay", true),
                             numbers_.emplace_back(momentum, "momentum", true)};
    return walk_group(
        names, params, state, normuon_ ? normuon : muon,
        [&](const Operand* operands, int64_t i, const Step&) {
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), numbers, rule);
        },
        [](PyObject*, int64_t) {});
  }

  int64_t workspace_bytes(int32_t gpu) override {
    const Rows& rows = rows_on({dlpack::kCuda, gpu});
    const Work work = work_of(rows);
    if (work.matrices.empty()) return 0;
    if constexpr (kWithCuda)
      return cuda::muon_workspace_bytes(work.matrices.data(), work.runs.data(), int64_t(work.runs.size()),
                                        int64_t(rows.options.size()), normuon_);
    return 0;
  }
  void launch_gpu(int32_t gpu, uintptr_t stream_address, uintptr_t workspace_address) override {
    const AdamGpuRows& tensors = gpu_rows(gpu);
    const Rows& rows = rows_on(tensors.device);
    const Work work = work_of(rows);
    if (work.matrices.empty()) return;
    const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
    const auto workspace = reinterpret_cast<void*>(workspace_address);
    tensors.check_workspace(workspace);
    const TensorTable table = tensors.table.table();
    const cuda::AdamWLossScale loss_scale = loss_scale_on(tensors.device);
    launch_on_gpu(gpu, [&] {
      return cuda::launch_muon(table, rows.options.data(), int64_t(rows.options.size()), loss_scale,
                               work.matrices.data(), work.runs.data(), int64_t(work.runs.size()), workspace, stream);
    });
  }
  // For a launch from Python: (rows, layouts, matrices, runs, options, loss scale) in the words of
  // triton_kernels/muon.py.
  py::tuple packed(int32_t gpu) {
    const AdamGpuRows& tensors = gpu_rows(gpu);
    return packed_rows_on(tensors.device, tensors.table.table(), loss_scale_on(tensors.device));
  }
  py::tuple packed_on_cpu() {
    return packed_rows_on({dlpack::kCpu, 0}, builder_.table(), {inv_grad_scale_on_host(), {}, {}});
  }
  void launch(int threads) override {
    const Rows& rows = rows_on({dlpack::kCpu, 0});
    const Work work = work_of(rows);
    std::vector<MuonScalars<double>> scalars;
    for (const cuda::MuonDeviceOptions& own : rows.options)
      scalars.push_back(generic::muon_scalars(own.options, inv_grad_scale_on_host()));
    const int64_t count = int64_t(work.runs.size()),
                  bytes = cpu::muon_workspace_bytes(work.matrices.data(), work.runs.data(), count, threads);
    workspace_.resize(bytes + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(workspace_.data());
    void* const aligned = workspace_.data() + (kAlignment - address % kAlignment) % kAlignment;
    const TensorTable table = builder_.table();
    Status status;
    {
      py::gil_scoped_release release;
      status = cpu::launch_muon(table, scalars.data(), work.matrices.data(), work.runs.data(), count, aligned, threads);
    }
    if (!status) throw std::runtime_error(status.error);
  }

 private:
  static constexpr int64_t kAlignment = 64;

  struct Batch {  // matrices of one schedule and one arithmetic
    bool wide;
    NewtonSchulzSchedule schedule;
    std::vector<MuonMatrix> matrices;
  };
  struct Rows {  // of one device, all of whose CPUs are one
    bool on_gpu;
    int32_t gpu;
    std::vector<cuda::MuonDeviceOptions> options;
    std::vector<Batch> batches;
  };
  struct Work {
    std::vector<MuonMatrix> matrices;
    std::vector<MuonRun> runs;
  };

  Rows& rows_on(dlpack::Device device) {
    const bool on_gpu = device.type == dlpack::kCuda;
    for (Rows& rows : rows_)
      if (rows.on_gpu == on_gpu && (!on_gpu || rows.gpu == device.id)) return rows;
    rows_.push_back({on_gpu, device.id, {}, {}});
    return rows_.back();
  }

  // On a GPU matrices of one shape come together, since their products do.
  static Work work_of(const Rows& rows) {
    Work work;
    for (const Batch& batch : rows.batches) {
      const int64_t begin = int64_t(work.matrices.size());
      work.matrices.insert(work.matrices.end(), batch.matrices.begin(), batch.matrices.end());
      if (rows.on_gpu)
        std::stable_sort(work.matrices.begin() + begin, work.matrices.end(),
                         [](const MuonMatrix& a, const MuonMatrix& b) {
                           return a.rows != b.rows ? a.rows < b.rows : a.columns < b.columns;
                         });
      work.runs.push_back({begin, int64_t(work.matrices.size()), batch.schedule, batch.wide});
    }
    return work;
  }

  py::tuple packed_rows_on(dlpack::Device device, const TensorTable& table, const cuda::AdamWLossScale& loss_scale) {
    const Rows& rows = rows_on(device);
    const Work work = work_of(rows);
    PackedWords matrices, options, scale;
    py::list runs;
    for (const MuonRun& run : work.runs) {
      const NewtonSchulzSchedule& schedule = run.schedule;
      py::list steps;
      for (const NewtonSchulzStep& s : schedule.steps) steps.append(py::make_tuple(s.a, s.b, s.c, s.restart_before));
      runs.append(py::make_tuple(run.begin, run.end, run.wide, steps, schedule.gram_from, int(schedule.dtype),
                                 int(schedule.arithmetic)));
    }
    for (const MuonMatrix& m : work.matrices) {
      for (const int64_t word : {m.row, m.offset, m.rows, m.columns, m.stride, int64_t(m.by_column), m.first_line})
        matrices.add(word);
      matrices.add(m.scale);
    }
    for (const cuda::MuonDeviceOptions& own : rows.options) {
      const MuonOptions& o = own.options;
      for (const double number : {o.lr, o.weight_decay, o.momentum, o.beta2}) options.add(number);
      for (const bool flag : {o.nesterov, o.sum_form, o.maximize, o.cautious}) options.add(int64_t(flag));
      for (const cuda::DeviceNumber& number : {own.lr, own.weight_decay, own.momentum}) options.add(number);
    }
    scale.add(loss_scale.inv_grad_scale);
    scale.add(loss_scale.grad_scale);
    scale.add(loss_scale.found_inf);
    return py::make_tuple(packed_rows(table), packed_layouts(table), matrices.array(), runs, options.array(),
                          scale.array());
  }

  void check_row(const Operand* operands, const ArgNames& names, int64_t index) const {
    for (int role = 0; role < roles_; ++role)
      if (operands[role].view.complex)
        throw py::type_error(describe(names.of(role, index), operands[role].object) +
                             ": Muon does not take complex numbers");
    if (operands[0].view.ndim < 2)
      throw py::value_error(describe(names.of(0, index), operands[0].object) +
                            ": Muon takes matrices, arrays of two axes or more; give vectors to AdamW: "
                            "fusedopt.param_groups_for(model)");
    check_adam_dtypes(operands, names, index, Role::kMomentum, Role::kRowSq);
    if (normuon_ && operands[Role::kRowSq].view.dtype != DType::kFloat32)
      throw py::type_error(describe(names.of(Role::kRowSq, index), operands[Role::kRowSq].object) +
                           ": row statistics are float32");
  }

  void add(const Operand* operands, const ArgNames* names, int64_t index, PyObject* partition, const Numbers& numbers,
           const Rule& rule) {
    check_row(operands, *names, index);
    const dlpack::Device device = operands[0].view.device;
    Rows& rows = rows_on(device);
    TableBuilder& builder = rows.on_gpu ? gpu_rows(device).table : builder_;
    if (rows.on_gpu && !gpu_rows(device).first) gpu_rows(device).first = operands[0].object;
    const int64_t row = builder.table().size;
    std::vector<MuonMatrix> matrices;
    Blocks lines;
    for (const Piece& piece : pieces_of_.next(partition, operands[0].view, names->of(0, index))) {
      const int64_t outputs = piece.transposed ? piece.columns : piece.rows,
                    inputs = piece.transposed ? piece.rows : piece.columns;
      const bool square = piece.rows == piece.columns;
      const bool by_column = rule.short_axis && !square ? piece.columns > piece.rows : piece.transposed;
      matrices.push_back({row, piece.offset, piece.rows, piece.columns, piece.stride, by_column,
                          generic::muon_scale(rule.scale, double(outputs), double(inputs)), lines.count});
      lines.count += matrices.back().lines();
    }
    builder.add(operands, names, index, options_for(rows, device, numbers, rule), normuon_ ? &lines : nullptr);
    if (builder.table().size == row) return;  // empty
    const bool wide = operands[0].view.dtype == DType::kFloat64;
    const Schedules& schedules = rows.on_gpu ? rule.on_gpu : rule.on_cpu;
    Batch& batch = batch_for(rows, wide ? schedules.second : schedules.first, wide);
    batch.matrices.insert(batch.matrices.end(), matrices.begin(), matrices.end());
  }

  // The index of these options among the rows'. Neighbours mostly share them.
  int32_t options_for(Rows& rows, dlpack::Device device, const Numbers& numbers, const Rule& rule) {
    const auto value = [&](const Number& x) { return rows.on_gpu && x.on_gpu() ? 0 : x.on_host(); };
    const auto there = [&](const Number& x) { return rows.on_gpu ? on(device, x) : cuda::DeviceNumber{}; };
    const cuda::MuonDeviceOptions own = {{value(numbers.lr), value(numbers.weight_decay), value(numbers.momentum),
                                          rule.beta2, rule.nesterov, rule.sum_form, rule.maximize, rule.cautious},
                                         there(numbers.lr),
                                         there(numbers.weight_decay),
                                         there(numbers.momentum)};
    if (rows.options.empty() || !equal(rows.options.back(), own)) rows.options.push_back(own);
    return int32_t(rows.options.size()) - 1;
  }

  static Batch& batch_for(Rows& rows, const NewtonSchulzSchedule& schedule, bool wide) {
    for (Batch& batch : rows.batches)
      if (batch.wide == wide && same(batch.schedule, schedule)) return batch;
    rows.batches.push_back({wide, schedule, {}});
    return rows.batches.back();
  }

  const bool normuon_;
  Resolver<std::vector<Piece>> pieces_of_;
  std::vector<Rows> rows_;
  std::vector<char> workspace_;
};

}  // namespace

void bind_muon(py::module_& module) {
  using namespace py::literals;
  py::class_<MuonPlan, AdamPlan>(module, "MuonPlan")
      .def(py::init<py::object, bool>(), "resolve"_a, "normuon"_a)
      .def("packed", &MuonPlan::packed, "gpu"_a)
      .def("packed_on_cpu", &MuonPlan::packed_on_cpu)
      .def("add_lists", &MuonPlan::add_lists, "params"_a, "grads"_a, "momentum_buffers"_a, "row_sqs"_a, "partitions"_a,
           "lr"_a, "weight_decay"_a, "momentum"_a, "options"_a)
      .def("add_group", &MuonPlan::add_group, "group"_a, "params"_a, "state"_a, "partitions"_a, "lr"_a,
           "weight_decay"_a, "momentum"_a, "options"_a);
}

}  // namespace fusedopt
