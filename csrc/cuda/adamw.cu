// AdamW on a GPU: the formula of math/adamw.h over a tensor table.
//
// 28 bytes per element in fp32, 22 with bf16 parameters and gradients, 14 in bf16 (amsgrad: 36, 30, 18), against one
// division and one square root: memory-bound. The capturable step adds two small kernels, one thread a counter and one
// an option.
#define FUSEDOPT_TARGET cuda
#include <cstddef>

#include "cuda/adamw.h"
#include "cuda/device_number.cuh"
#include "cuda/elementwise.cuh"

namespace fusedopt::cuda {
namespace {

struct Prepared {  // by prepare_kernel, in the workspace
  AdamWScalars<double> scalars;
  int64_t skip;
};

struct AdamW {
  using Role = AdamWRole;
  static constexpr int kRoles = Role::kCount;
  static constexpr unsigned kOptional = 1u << Role::kMaxExpAvgSq;
  static constexpr unsigned kWrites =
      1u << Role::kParam | 1u << Role::kExpAvg | 1u << Role::kExpAvgSq | 1u << Role::kMaxExpAvgSq;

  template <typename S>
  using Scalars = AdamWScalars<S>;

  template <typename S>
  struct Record {
    const Prepared* prepared;
    AdamWScalars<S> scalars;  // sent if nothing is prepared
    size_t bytes() const { return prepared ? sizeof prepared : sizeof *this; }
  };

  const AdamWScalars<double>* scalars;  // one of the two
  const Prepared* prepared;

  template <typename S>
  Record<S> record(const TensorRow& row) const {
    if (prepared) return {prepared + row.scalars, {}};
    return {nullptr, scalars[row.scalars].as<S>()};
  }

  template <typename S>
  __device__ static bool prepare(const uint64_t* words, AdamWScalars<S>& k) {
    const auto* prepared = reinterpret_cast<const Prepared*>(words[0]);
    if (!prepared) {
      memcpy(&k, words + offsetof(Record<S>, scalars) / sizeof *words, sizeof k);
      return true;
    }
    if (prepared->skip) return false;
    k = prepared->scalars.template as<S>();
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

// ---- numbers on the device

__global__ void __launch_bounds__(kThreads) prepare_kernel(const Batch<AdamWDeviceOptions> __grid_constant__ options,
                                                           AdamWLossScale loss_scale, Prepared* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= options.size) return;
  const AdamWDeviceOptions& own = options.items[i];
  AdamWOptions numbers = own.options;
  if (own.lr.data) numbers.lr = read(own.lr);
  if (own.weight_decay.data) numbers.weight_decay = read(own.weight_decay);
  const int64_t step = own.step.data ? int64_t(read(own.step)) : own.host_step;
  const bool scaled = loss_scale.grad_scale.data;
  const double inv_grad_scale = scaled ? 1.0 / read(loss_scale.grad_scale) : loss_scale.inv_grad_scale;
  prepared[i].scalars = adamw_scalars(numbers, step, inv_grad_scale);
  prepared[i].skip = is_set(loss_scale.found_inf);
}

}  // namespace

Status launch_adamw(const TensorTable& table, const AdamWScalars<double>* scalars, cudaStream_t stream) {
  return launch_elementwise(AdamW{scalars, nullptr}, table, Formats(), stream);
}

int64_t adamw_workspace_bytes(int64_t options_size) { return options_size * int64_t(sizeof(Prepared)); }

Status launch_adamw_capturable(const TensorTable& table, const AdamWDeviceOptions* options, int64_t options_size,
                               const DeviceNumber* counters, int64_t counters_size, const AdamWLossScale& loss_scale,
                               void* workspace, cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;  // before any counter moves
  auto* prepared = static_cast<Prepared*>(workspace);
  Status status = launch_increment(counters, counters_size, loss_scale.found_inf, stream);
  if (!status) return status;
  status = launch_batches(options, options_size, [&](const auto& batch, dim3 grid, int64_t first) {
    return launch(prepare_kernel, grid, dim3(kThreads), 0, stream, batch, loss_scale, prepared + first);
  });
  if (!status) return status;
  return launch_elementwise(AdamW{nullptr, prepared}, table, Formats(), stream);
}

}  // namespace fusedopt::cuda
