// AdamW on a GPU: the formula of math/adamw.h over a tensor table.
//
// 28 bytes per element in fp32, 22 with bf16 parameters and gradients, 14 in bf16 (amsgrad: 36, 30, 18), against one
// division and one square root: memory-bound. The capturable step adds a small kernel, one thread for each tensor's
// numbers.
#define FUSEDOPT_TARGET cuda
#include "cuda/adam_scalars.cuh"
#include "cuda/adamw.h"
#include "cuda/elementwise.cuh"

namespace fusedopt::cuda {
namespace {

struct AdamW {
  using Role = AdamWRole;
  static constexpr int kRoles = Role::kCount;
  static constexpr unsigned kOptional = 1u << Role::kMaxExpAvgSq;
  static constexpr unsigned kWrites =
      1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kExpAvgSq | 1u << Role::kMaxExpAvgSq;

  template <typename S>
  using Scalars = AdamWScalars<S>;

  const ScalarsSource& source;
  const OwnNumbers own;

  template <typename S>
  ScalarsRecord<S> record(const TensorRow& row) const {
    return source.record<S>(own == OwnNumbers::kPrepared ? 0 : row.scalars);
  }
  bool shares(const TensorRow& a, const TensorRow& b) const {
    return own == OwnNumbers::kPrepared || a.scalars == b.scalars ||
           share_record(source.scalars[a.scalars], source.scalars[b.scalars], own);
  }
  template <typename S>
  int own_bytes() const {
    constexpr int kBytes[] = {0, 2 * sizeof(S), 3 * sizeof(S), sizeof(int32_t)};
    return kBytes[int(own)];
  }
  template <typename S>
  void write_own(const TensorRow& row, void* to) const {
    if (own == OwnNumbers::kPrepared) {
      memcpy(to, &row.scalars, sizeof row.scalars);
    } else if (own != OwnNumbers::kNone) {
      const AdamWScalars<S> k = source.scalars[row.scalars].template as<S>();
      const S numbers[] = {k.rate, k.decay, k.inv_sqrt_c2};
      memcpy(to, numbers, own_bytes<S>());
    }
  }

  template <typename S>
  __device__ static bool prepare(const uint64_t* words, const Own& own, AdamWScalars<S>& k) {
    const bool prepared = words[0];
    if (!read_scalars(words, prepared ? own.template at<int32_t>(0) : 0, k)) return false;
    if (prepared || own.bytes == 0) return true;
    k.rate = own.template at<S>(0);
    k.decay = own.template at<S>(1);
    if (own.bytes > int(2 * sizeof(S))) k.inv_sqrt_c2 = own.template at<S>(2);
    return true;
  }

  template <typename S>
  __device__ static void update(S& param, S grad, S& exp_avg, S& exp_avg_sq, S& max_exp_avg_sq, bool amsgrad,
                                const AdamWScalars<S>& k) {
    adamw_moments(grad, exp_avg, exp_avg_sq, max_exp_avg_sq, amsgrad, k);
    const S root = adamw_root(exp_avg_sq, max_exp_avg_sq, amsgrad);
    param = adamw_param(param, adamw_direction(exp_avg, root, k), k);
  }
};

template <typename Param, typename Grad, typename State>
using AdamWFormat = Format<Param, Grad, State, State, State>;

using Formats = FormatList<AdamWFormat<Float32, Float32, Float32>, AdamWFormat<Float32, Float32, BFloat16>,
                           AdamWFormat<Float32, BFloat16, Float32>, AdamWFormat<BFloat16, BFloat16, Float32>,
                           AdamWFormat<BFloat16, Float32, Float32>, AdamWFormat<BFloat16, BFloat16, BFloat16>,
                           AdamWFormat<Float16, Float16, Float16>, AdamWFormat<Float16, Float16, Float32>,
                           AdamWFormat<Float64, Float64, Float64>>;

}  // namespace

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, cudaStream_t stream) {
  return launch_adamw(table, ScalarsSource{scalars, nullptr}, stream);
}

Status launch_adamw(const TensorTable& table, const ScalarsSource& source, cudaStream_t stream) {
  return launch_elementwise(AdamW{source, own_numbers(source, table)}, table, Formats(), stream);
}

int64_t adamw_workspace_bytes(int64_t options_size) { return options_size * int64_t(sizeof(PreparedScalars)); }

Status launch_adamw_capturable(const TensorTable& table, const AdamWDeviceOptions* options, int64_t options_size,
                               const DeviceNumber* counters, int64_t counters_size, const AdamWLossScale& loss_scale,
                               void* workspace, cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;  // before any counter moves
  auto* prepared = static_cast<PreparedScalars*>(workspace);
  const Status status =
      launch_prepare_scalars(options, options_size, counters, counters_size, loss_scale, prepared, stream);
  if (!status) return status;
  return launch_adamw(table, ScalarsSource{nullptr, prepared}, stream);
}

}  // namespace fusedopt::cuda
