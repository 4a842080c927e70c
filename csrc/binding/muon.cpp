// Muon's side of the binding: reads the arrays and partitions, packs the table, the matrices in it and their scalars,
// and launches. NorMuon is Muon with one more state.
#include "binding/muon.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "binding/adam_plan.h"
#include "binding/resolver.h"
#include "cpu/muon.h"

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

// How one list or group is stepped, beside lr and decay.
struct Rule {
  double momentum;
  bool nesterov, sum_form, maximize, cautious;
  std::string adjust_lr_fn;
  double beta2;
  bool short_axis;
  NewtonSchulzSchedule schedule, wide_schedule;  // the latter for parameters of float64
};

Rule rule_of(const py::dict& options) {
  const auto get = [&](const char* key) { return options[key]; };
  return {get("momentum").cast<double>(),
          get("nesterov").cast<bool>(),
          get("sum_form").cast<bool>(),
          get("maximize").cast<bool>(),
          get("cautious_weight_decay").cast<bool>(),
          get("adjust_lr_fn").cast<std::string>(),
          get("beta2").cast<double>(),
          get("axis").cast<std::string>() == "short",
          get("schedule").cast<NewtonSchulzSchedule>(),
          get("wide_schedule").cast<NewtonSchulzSchedule>()};
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
    inv_grad_scale_ = 1.0 / grad_scale.cast<double>();
    scalars_.clear();
    batches_.clear();
    lists_ = 0;
  }

  void add_lists(const py::sequence& params, const py::sequence& grads, const py::sequence& momentum_buffers,
                 const py::object& row_sqs, const py::list& partitions, const std::vector<double>& lr,
                 const std::vector<double>& weight_decay, const py::dict& options) {
    ArgNames& names = names_.emplace_back();
    names.roles = {{"params", ""}, {"grads", ""}, {"momentum_buffers", ""}, {"row_sqs", ""}};
    std::vector<py::sequence> lists = {params, grads, momentum_buffers};
    if (normuon_) lists.push_back(row_sqs);
    const Rule rule = rule_of(options);
    walk_lists(
        names, lists, py::int_(0),
        [&](const Operand* operands, int64_t i, const Step&) {
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), lr[lr.size() > 1 ? i : 0],
              weight_decay[weight_decay.size() > 1 ? i : 0], rule);
        },
        [](const Operand*, int64_t) {});
    ++lists_;
  }

  py::list add_group(int64_t group, const py::list& params, const py::dict& state, const py::list& partitions,
                     double lr, double weight_decay, const py::dict& options) {
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
    py::list missing = walk_group(
        names, params, state, normuon_ ? normuon : muon,
        [&](const Operand* operands, int64_t i, const Step&) {
          add(operands, &names, i, PyList_GET_ITEM(partitions.ptr(), i), lr, weight_decay, rule);
        },
        [](PyObject*, int64_t) {});
    ++lists_;
    return missing;
  }

  int64_t workspace_bytes(int32_t) override { return 0; }
  void launch_gpu(int32_t, uintptr_t, uintptr_t) override { throw std::runtime_error("Muon has no kernels for GPUs"); }
  void launch(int threads) override {
    std::vector<MuonMatrix> matrices;
    std::vector<MuonRun> runs;
    for (const Batch& batch : batches_) {
      const int64_t begin = int64_t(matrices.size());
      matrices.insert(matrices.end(), batch.matrices.begin(), batch.matrices.end());
      runs.push_back({begin, int64_t(matrices.size()), batch.schedule, batch.wide});
    }
    const int64_t count = int64_t(runs.size()),
                  bytes = cpu::muon_workspace_bytes(matrices.data(), runs.data(), count, threads);
    workspace_.resize(bytes + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(workspace_.data());
    void* const aligned = workspace_.data() + (kAlignment - address % kAlignment) % kAlignment;
    const TensorTable table = builder_.table();
    Status status;
    {
      py::gil_scoped_release release;
      status = cpu::launch_muon(table, scalars_.data(), matrices.data(), runs.data(), count, aligned, threads);
    }
    if (!status) throw std::runtime_error(status.error);
  }

 private:
  static constexpr int64_t kAlignment = 64;

  struct Batch {  // matrices of one list or group and one arithmetic
    int64_t list;
    bool wide;
    NewtonSchulzSchedule schedule;
    std::vector<MuonMatrix> matrices;
  };

  void check_row(const Operand* operands, const ArgNames& names, int64_t index) const {
    if (operands[0].view.device.type == dlpack::kCuda)
      throw py::value_error(describe(names.of(0, index), operands[0].object) +
                            ": is on a GPU, but Muon has kernels for arrays on the CPU only");
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

  void add(const Operand* operands, const ArgNames* names, int64_t index, PyObject* partition, double lr,
           double weight_decay, const Rule& rule) {
    check_row(operands, *names, index);
    const MuonOptions options = {lr,
                                 weight_decay,
                                 rule.momentum,
                                 rule.beta2,
                                 rule.nesterov,
                                 rule.sum_form,
                                 rule.maximize,
                                 rule.cautious,
                                 scale_of(rule.adjust_lr_fn)};
    const int64_t row = builder_.table().size;
    std::vector<MuonMatrix> matrices;
    Blocks lines;
    for (const Piece& piece : pieces_of_.next(partition, operands[0].view, names->of(0, index))) {
      const int64_t outputs = piece.transposed ? piece.columns : piece.rows,
                    inputs = piece.transposed ? piece.rows : piece.columns;
      const bool square = piece.rows == piece.columns;
      const bool by_column = rule.short_axis && !square ? piece.columns > piece.rows : piece.transposed;
      matrices.push_back({row, piece.offset, piece.rows, piece.columns, piece.stride, by_column,
                          generic::muon_rate(options, double(outputs), double(inputs)), lines.count});
      lines.count += matrices.back().lines();
    }
    builder_.add(operands, names, index, int32_t(scalars_.size()), normuon_ ? &lines : nullptr);
    if (builder_.table().size == row) return;  // empty
    scalars_.push_back(generic::muon_scalars(options, inv_grad_scale_));
    Batch& batch = batch_for(rule, operands[0].view.dtype == DType::kFloat64);
    batch.matrices.insert(batch.matrices.end(), matrices.begin(), matrices.end());
  }

  Batch& batch_for(const Rule& rule, bool wide) {
    for (Batch& batch : batches_)
      if (batch.list == lists_ && batch.wide == wide) return batch;
    Batch& batch = batches_.emplace_back();
    batch.list = lists_;
    batch.wide = wide;
    batch.schedule = wide ? rule.wide_schedule : rule.schedule;
    return batch;
  }

  const bool normuon_;
  Resolver<std::vector<Piece>> pieces_of_;
  double inv_grad_scale_ = 1;
  std::vector<MuonScalars<double>> scalars_;
  std::vector<Batch> batches_;
  int64_t lists_ = 0;  // lists and groups added so far
  std::vector<char> workspace_;
};

}  // namespace

void bind_muon(py::module_& module) {
  using namespace py::literals;
  py::class_<MuonPlan, AdamPlan>(module, "MuonPlan")
      .def(py::init<py::object, bool>(), "resolve"_a, "normuon"_a)
      .def("add_lists", &MuonPlan::add_lists, "params"_a, "grads"_a, "momentum_buffers"_a, "row_sqs"_a, "partitions"_a,
           "lr"_a, "weight_decay"_a, "options"_a)
      .def("add_group", &MuonPlan::add_group, "group"_a, "params"_a, "state"_a, "partitions"_a, "lr"_a,
           "weight_decay"_a, "options"_a);
}

}  // namespace fusedopt
