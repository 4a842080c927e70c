// Blocks of one coordinate in tensors with strides: AdamW, element by element.
#pragma once
#include "cuda/blockwise_adam/region.cuh"

namespace fusedopt::FUSEDOPT_TARGET {

template <typename S>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 3)
    block_coordinates_kernel(const RowTable __grid_constant__ rows) {
  const Region region(rows);
  AdamWScalars<double> scalars;
  if (!region.scalars(scalars)) return;
  const AdamWScalars<S> k = scalars.template as<S>();
  const Tile tile(region.kind.split, region.index, 0);
  for_each_unit<1>(tile, [&](const TileUnit<1>& unit) {
    for_each_element(region, unit, [&](int, const int64_t(&at)[kElementRoles]) {
      S param = load_element<S>(region, Role::kParam, at), exp_avg = load_element<S>(region, Role::kExpAvg, at);
      float* const block_sq = address<float>(region.row, kBlockSq) + unit.at;
      S v = *block_sq, no_maximum = v;
      adamw_moments(load_element<S>(region, Role::kGrad, at), exp_avg, v, no_maximum, false, k);
      param = adamw_param(param, adamw_direction(exp_avg, adamw_root(v, v, false), k), k);
      store_element(region, Role::kParam, at, param);
      store_element(region, Role::kExpAvg, at, exp_avg);
      *block_sq = float(v);
    });
  });
}

}  // namespace fusedopt::FUSEDOPT_TARGET
