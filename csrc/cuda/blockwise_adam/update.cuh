// The update of a tile, from its blocks' rates; and a block's rate.
#pragma once
#include "cuda/blockwise_adam/region.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

template <typename S>
struct StepScalars {
  S lerp_weight, grad_factor, decay;
  bool lerp_from_grad;
  __device__ explicit StepScalars(const AdamWScalars<double>& k)
      : lerp_weight(S(k.lerp_weight)),
        grad_factor(S(k.grad_factor)),
        decay(S(k.decay)),
        lerp_from_grad(k.lerp_from_grad) {}
};

template <typename S>
__device__ void step(S& param, S grad, S& exp_avg, S rate, const StepScalars<S>& k) {
  adamw_first_moment(grad, exp_avg, k);
  blockwise_adam_param(param, exp_avg, rate, k.decay);
}

// The rates of a unit's elements, from those of the tile's blocks.
template <typename S, int kWidth>
__device__ void rates_of_unit(const Tile& tile, const TileUnit<kWidth>& unit, const S* rates, S (&rate)[kWidth]) {
  const int first = unit.in_blocks > 0 ? unit.in_blocks : 0, last = tile.blocks - 1;
  int block = first / tile.group, next = (block + 1) * tile.group;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (unit.in_blocks + j == next) ++block, next += tile.group;
    rate[j] = rates[block < last ? block : last];
  }
}

template <bool kStaged, typename S, int kWidth>
__device__ void update_whole(const Region& region, const Tile& tile, const TileUnit<kWidth>& unit, const S* staged,
                             const S* rates, const StepScalars<S>& k) {
  const DType* dtype = region.kind.dtype;
  RawUnit<S, kWidth> raw[kElementRoles];  // all on their way before one is waited for
#pragma unroll
  for (int role = 0; role < kElementRoles; ++role)
    if (!kStaged || role != Role::kGrad) load_unit<S, kWidth>(dtype[role], region.data(role, unit.at), raw[role]);
  S rate[kWidth], x[kElementRoles][kWidth];
  rates_of_unit(tile, unit, rates, rate);
  if (kStaged) read_unit(staged + unit.index, x[Role::kGrad]);
#pragma unroll
  for (int role = 0; role < kElementRoles; ++role)
    if (!kStaged || role != Role::kGrad) decode_unit<S, kWidth>(dtype[role], raw[role], x[role]);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) step(x[Role::kParam][j], x[Role::kGrad][j], x[Role::kExpAvg][j], rate[j], k);
  store_unit<S, kWidth>(dtype[Role::kParam], region.data(Role::kParam, unit.at), x[Role::kParam]);
  store_unit<S, kWidth>(dtype[Role::kExpAvg], region.data(Role::kExpAvg, unit.at), x[Role::kExpAvg]);
}

// A tile of moments and parameters. kStaged: its gradients lie in shared memory.
template <bool kStaged, int kWidth, typename S>
__device__ void update_tile(const Region& region, const Tile& tile, const S* staged, const S* rates,
                            const StepScalars<S>& k) {
  const bool vectors = region.has_vectors<S, kWidth>(tile, Role::kParam, Role::kExpAvg);
  for_each_unit<kWidth>(tile, [&](const TileUnit<kWidth>& unit) {
    if (vectors && unit.whole()) return update_whole<kStaged>(region, tile, unit, staged, rates, k);
    for_each_element(region, unit, [&](int j, const int64_t(&at)[kElementRoles]) {
      S param = load_element<S>(region, Role::kParam, at), exp_avg = load_element<S>(region, Role::kExpAvg, at);
      const S grad = kStaged ? staged[unit.index + j] : load_element<S>(region, Role::kGrad, at);
      step(param, grad, exp_avg, rates[(unit.in_blocks + j) / tile.group], k);
      store_element(region, Role::kParam, at, param);
      store_element(region, Role::kExpAvg, at, exp_avg);
    });
  });
}

// A block's new second moment, and its rate.
__device__ inline double update_block(float* block_sq, double sum, double count, const AdamWScalars<double>& k) {
  double v = *block_sq;
  const double rate = blockwise_adam_rate(v, sum, k.grad_weight / count, k);
  *block_sq = float(v);
  return rate;
}

}  // namespace fusedopt::FUSEDOPT_TARGET
