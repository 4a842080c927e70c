// Blockwise Adam on a GPU: the formula of math/blockwise_adam.h over a tensor table with blocks.
//
// One pass, 20 bytes per element in fp32, over whole blocks whose gradient waits in shared memory while its squares are
// added up, in double. Two passes, 24 bytes, for larger blocks, columns, blocks over several tensors, and tensors with
// strides: the sums of each tile; from them, in a fixed order, each block's second moment and rate; then the update.
// Blocks of one coordinate are AdamW's kernels. No division and no root per element: memory-bound.
#define FUSEDOPT_TARGET cuda
#include <algorithm>
#include <array>
#include <vector>

#include "cuda/adam_scalars.cuh"
#include "cuda/adamw.h"
#include "cuda/blocks.cuh"
#include "cuda/blockwise_adam.h"
#include "cuda/device_number.cuh"
#include "cuda/units.cuh"
#include "math/blockwise_adam.h"

namespace fusedopt::cuda {
namespace {

using Role = BlockwiseAdamRole;
constexpr int kElementRoles = Role::kBlockSq;  // those with a value per element

// A row of the kernels' table is a region: the addresses of its first elements (of the tensor's first where the tensor
// has strides), of its first block's second moment, and in the workspace of its blocks' rates and its tiles' sums.
enum RowWord { kParam, kGrad, kExpAvg, kBlockSq, kRates, kParts, kRowWords };
static_assert(kGrad == int(Role::kGrad) && kBlockSq == int(Role::kBlockSq));

struct RegionKind {  // a row's kind; sizes[ndim] and strides[ndim] of each role follow it
  ScalarsRecord<double> scalars;
  BlockSplit split;
  const double* shared_sum;  // nullptr: the blocks are this region's own
  double shared_count;
  int64_t offset;  // of the region in a tensor that has strides
  DType dtype[Role::kCount];
  int32_t ndim;  // 0: flat
};
constexpr int kKindWords = sizeof(RegionKind) / sizeof(uint64_t);
static_assert(sizeof(RegionKind) % sizeof(uint64_t) == 0);

// ---- device: a region

struct Region {
  const uint64_t* row;
  RegionKind kind;
  const uint64_t* layout;
  uint32_t index;  // of this thread block's tile
  int head;

  __device__ explicit Region(const RowTable& rows) {
    const FoundRow found = find_row(rows);
    const uint64_t* words = rows.words + found.place.kind;
    row = found.words;
    memcpy(&kind, words, sizeof kind);
    layout = words + kKindWords;
    index = found.index;
    head = int(found.place.head);
  }
  __device__ bool scalars(AdamWScalars<double>& k) const { return read_scalars(layout - kKindWords, 0, k); }

  __device__ char* data(int role, int64_t at) const {
    return address<char>(row, role) + at * bytes_of(kind.dtype[role]);
  }
  __device__ void find(int64_t at, int64_t (&place)[kElementRoles]) const {
    find_element(layout, kind.ndim, kElementRoles, kind.ndim ? kind.offset + at : at, place);
  }

  // Whether whole units of these roles can be read and written 16 bytes at a time.
  template <typename S, int kWidth>
  __device__ bool has_vectors(const Tile& tile, int first_role, int last_role) const {
    if (kind.ndim) return false;
    bool vectors = true;
    for (int role = first_role; role <= last_role; ++role) {
      const int size = bytes_of(kind.dtype[role]);
      vectors &= size <= int(sizeof(S)) && size * kWidth >= kVectorBytes;
      vectors &= reinterpret_cast<uintptr_t>(data(role, tile.begin)) % kVectorBytes == 0;
      vectors &= tile.rows <= 1 || tile.stride * size % kVectorBytes == 0;
    }
    return vectors;
  }
};

template <typename S, int kWidth>
__device__ void load_grads(const Region& region, const TileUnit<kWidth>& unit, S (&x)[kWidth]) {
  RawUnit<S, kWidth> raw;
  load_unit<S, kWidth>(region.kind.dtype[Role::kGrad], region.data(Role::kGrad, unit.at), raw);
  decode_unit<S, kWidth>(region.kind.dtype[Role::kGrad], raw, x);
}
// Units that are not whole or not aligned, and those of unusual arrays: calls f(j, places) for one element after the
// other.
template <int kWidth, typename F>
__device__ void for_each_element(const Region& region, const TileUnit<kWidth>& unit, F f) {
#pragma unroll 1
  for (int j = unit.from; j < unit.to; ++j) {
    int64_t at[kElementRoles];
    region.find(unit.at + j, at);
    f(j, at);
  }
}
template <typename S>
__device__ S load_element(const Region& region, int role, const int64_t (&at)[kElementRoles]) {
  return load_any<S>(region.kind.dtype[role], address<void>(region.row, role), at[role]);
}
template <typename S>
__device__ void store_element(const Region& region, int role, const int64_t (&at)[kElementRoles], S x) {
  store_any(region.kind.dtype[role], address<void>(region.row, role), at[role], x);
}

// ---- device: the update

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
__device__ double update_block(float* block_sq, double sum, double count, const AdamWScalars<double>& k) {
  double v = *block_sq;
  const double rate = blockwise_adam_rate(v, sum, k.grad_weight / count, k);
  *block_sq = float(v);
  return rate;
}

// ---- one pass

// Elements of shared memory: the tile's gradients in whole units, then its blocks' rates.
HOST_DEVICE inline int64_t staged_size(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }
inline int64_t staged_elements(const BlockSplit& split) {
  return staged_size(split.width + kUnit - 1) + split.blocks_per_tile;
}

// The tile's gradients to shared memory; the rest of what its update needs is asked for meanwhile.
template <int kWidth, typename S>
__device__ void stage_grads(const Region& region, const Tile& tile, S* staged) {
  const bool vectors = region.has_vectors<S, kWidth>(tile, Role::kGrad, Role::kGrad);
  for_each_unit<kWidth>(tile, [&](const TileUnit<kWidth>& unit) {
    if (!vectors || !unit.whole())
      return for_each_element(region, unit, [&](int j, const int64_t(&at)[kElementRoles]) {
        staged[unit.index + j] = load_element<S>(region, Role::kGrad, at);
      });
    S x[kWidth];
    load_grads(region, unit, x);
    prefetch_l2(region.data(Role::kParam, unit.at));
    prefetch_l2(region.data(Role::kExpAvg, unit.at));
    write_unit(staged + unit.index, x);
  });
}

template <typename S, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 4)
    block_one_pass_kernel(const RowTable __grid_constant__ rows) {
  DYNAMIC_SMEM(S, staged);
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  stage_grads<kWidth>(region, tile, staged);
  __syncthreads();
  S* const rates = staged + staged_size(tile.count);
  float* const block_sq = address<float>(region.row, kBlockSq) + tile.block;
  const int width = tile.count - tile.lead;
  const auto size_of_block = [&](int block) {
    const int left = width - block * tile.group;
    return left < tile.group ? left : tile.group;
  };
  sum_blocks(
      tile.blocks, size_of_block,
      [&](int block, int64_t i, double sum) {
        const double x = staged[tile.lead + block * tile.group + int(i)];
        return fma(x, x, sum);
      },
      [&](int block, double sum) { rates[block] = S(update_block(block_sq + block, sum, size_of_block(block), k)); });
  __syncthreads();
  update_tile<true, kWidth>(region, tile, staged, rates, StepScalars<S>(k));
}

// ---- two passes

template <typename S>
__device__ void add_squares(const Region& region, const TileUnit<kUnit>& unit, bool vectors, double (&sum)[kUnit]) {
  if (!vectors || !unit.whole())
    return for_each_element(region, unit, [&](int j, const int64_t(&at)[kElementRoles]) {
      const double x = load_element<S>(region, Role::kGrad, at);
#pragma unroll
      for (int i = 0; i < kUnit; ++i)  // so that the sums stay in registers
        if (i == j) sum[i] = fma(x, x, sum[i]);
    });
  S x[kUnit];
  load_grads(region, unit, x);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sum[j] = fma(double(x[j]), double(x[j]), sum[j]);
}

// The sum of squared gradients of each block in each tile: [tile][block of the tile].
template <typename S>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 3)
    block_sums_kernel(const RowTable __grid_constant__ rows) {
  __shared__ double sums[kUnit][kBlockThreads];  // by place in the unit, and thread
  const Region region(rows);
  AdamWScalars<double> scalars;
  if (!region.scalars(scalars)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  const bool vectors = region.has_vectors<S, kUnit>(tile, Role::kGrad, Role::kGrad);
  const int units = tile.units_per_row(kUnit);
  int across = 1;  // threads to a row
  while (across < units) across *= 2;
  const int down = kBlockThreads / across, unit = threadIdx.x & (across - 1);
  double sum[kUnit] = {};
  if (unit < units)
    for (int row = threadIdx.x / across; row < tile.rows; row += down)
      add_squares<S>(region, TileUnit<kUnit>(tile, row, unit * kUnit), vectors, sum);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sums[j][threadIdx.x] = sum[j];
  __syncthreads();
  double* const out = address<double>(region.row, kParts) + region.index * region.kind.split.blocks_per_tile;
  const bool one = tile.group == kWholeTile;
  const auto columns_of = [&](int block) {
    const int left = tile.columns - tile.lead - block * tile.group;
    return one ? tile.columns : left < tile.group ? left : tile.group;
  };
  sum_blocks(
      tile.blocks, [&](int block) { return columns_of(block) * down; },
      [&](int block, int64_t i, double total) {
        const int columns = columns_of(block), row = int(i) / columns;
        const int column = (one ? 0 : tile.lead + block * tile.group) + int(i) - row * columns;
        return total + sums[column % kUnit][row * across + column / kUnit];
      },
      [&](int block, double total) { out[block] = total; });
}

struct SharedParts {  // the tiles' sums of a block over several tensors
  const double* parts;
  int64_t size;
  double* sum;
};

__global__ void __launch_bounds__(kBlockThreads) shared_sums_kernel(const Batch<SharedParts> __grid_constant__ shared) {
  const SharedParts& own = shared.items[blockIdx.x];
  sum_blocks(
      1, [&](int) { return own.size; }, [&](int, int64_t i, double total) { return total + own.parts[i]; },
      [&](int, double total) { *own.sum = total; });
}

// How many rates a thread block computes: the more parts a block has, the more threads add them up.
HOST_DEVICE inline int64_t rates_per_thread_block(const BlockSplit& split) {
  return split.parts() <= 16 ? kBlockThreads : split.parts() <= 512 ? kBlockThreads / 32 : 1;
}

// From sums to second moments and rates.
__global__ void __launch_bounds__(kBlockThreads, 2) block_rates_kernel(const RowTable __grid_constant__ rows) {
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const BlockSplit& split = region.kind.split;
  const int64_t first = int64_t(region.index) * rates_per_thread_block(split), left = split.blocks() - first;
  const int blocks = int(left < rates_per_thread_block(split) ? left : rates_per_thread_block(split));
  const auto* const parts = address<const double>(region.row, kParts);
  const double* const shared = region.kind.shared_sum;
  float* const block_sq = address<float>(region.row, kBlockSq) + first;
  double* const rates = address<double>(region.row, kRates) + first;
  sum_blocks(
      blocks, [&](int) { return shared ? 1 : split.parts(); },
      [&](int block, int64_t i, double total) {
        return total + (shared ? *shared : parts[split.place_of(first + block, i)]);
      },
      [&](int block, double total) {
        const double count = shared ? region.kind.shared_count : double(split.size_of_block(first + block));
        rates[block] = update_block(block_sq + block, total, count, k);
      });
}

template <typename S, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, sizeof(S) == 8 ? 2 : 3)
    block_update_kernel(const RowTable __grid_constant__ rows) {
  __shared__ S rates[kSpan];
  const Region region(rows);
  AdamWScalars<double> k;
  if (!region.scalars(k)) return;
  const Tile tile(region.kind.split, region.index, region.head);
  const auto* const from = address<const double>(region.row, kRates) + tile.block;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.blocks; i += kBlockThreads) rates[i] = S(from[i]);
  __syncthreads();
  update_tile<false, kWidth, S>(region, tile, nullptr, rates, StepScalars<S>(k));
}

// ---- blocks of one coordinate in tensors with strides: AdamW

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

// ---- tensors that have no gradient

struct ValueCopy {
  float* to;
  const float* from;
};

__global__ void __launch_bounds__(kThreads)
    copy_values_kernel(const Batch<ValueCopy> __grid_constant__ copies, const PreparedScalars* prepared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < copies.size && !(prepared && prepared->skip)) *copies.items[i].to = *copies.items[i].from;
}

// ---- host

enum class Way {
  kElements,     // AdamW's kernels
  kCoordinates,  // the same, where the tensor has strides
  kOnePass,
  kTwoPasses,
};

int64_t arithmetic_bytes(const TensorRow& row) { return row.dtype[Role::kParam] == DType::kFloat64 ? 8 : 4; }

// Float in units of 4 elements, in units of 8 where a role has 16 bits, double.
constexpr int kWidthClasses = 3;
int width_class(const TensorRow& row) {
  if (arithmetic_bytes(row) == 8) return 2;
  return std::any_of(row.dtype, row.dtype + kElementRoles, [](DType dtype) { return size_of(dtype) == 2; });
}
using RowKernel = decltype(block_rates_kernel);

Way way_of(const TensorRow& row, const BlockRegion& region) {
  const bool flat = row.layout == kFlat;
  if (region.rows > 1 || region.shared != kOwnBlocks) return Way::kTwoPasses;
  if (region.group == 1) return flat ? Way::kElements : Way::kCoordinates;
  return flat && region.group <= one_pass_elements(arithmetic_bytes(row)) ? Way::kOnePass : Way::kTwoPasses;
}

BlockSplit split_of(const TensorRow& row, const BlockRegion& region) {
  return way_of(row, region) == Way::kOnePass ? split_one_pass(region, arithmetic_bytes(row))
                                              : split_two_passes(region);
}

template <typename F>  // calls f(row, region, the region's index)
void for_each_region(const TensorTable& table, F f) {
  for (int64_t r = 0; r < table.size; ++r)
    for (int64_t i = table.blocks[r].begin; i < table.blocks[r].end; ++i) f(table.rows[r], table.regions[i], i);
}

// Where everything lies in the workspace, counted in doubles: the prepared scalars, the sums of shared blocks, their
// parts, then each region's rates and parts.
struct Workspace {
  struct Values {
    int64_t rates, parts;
  };
  struct Shared {
    int64_t parts = 0, size = 0;
    double count = 0;  // of elements
    const float* value = nullptr;
  };
  std::vector<Values> regions;
  std::vector<Shared> shared;
  int64_t shared_sums, size;

  Workspace(const TensorTable& table, int64_t options) {
    regions.resize(table.size ? table.blocks[table.size - 1].end : 0);
    for_each_region(table, [&](const TensorRow& row, const BlockRegion& region, int64_t) {
      if (region.shared == kOwnBlocks) return;
      if (region.shared >= int64_t(shared.size())) shared.resize(region.shared + 1);
      Shared& own = shared[region.shared];
      own.size += split_of(row, region).tiles();
      own.count += double(region.numel());
      if (!own.value) own.value = static_cast<float*>(row.data[Role::kBlockSq]) + region.first_block;
    });
    shared_sums = options * int64_t(sizeof(PreparedScalars) / sizeof(double));
    size = shared_sums + int64_t(shared.size());
    for (Shared& own : shared) own.parts = size, size += own.size, own.size = 0;
    for_each_region(table, [&](const TensorRow& row, const BlockRegion& region, int64_t i) {
      if (way_of(row, region) != Way::kTwoPasses) return;
      const BlockSplit split = split_of(row, region);
      const int64_t parts = split.tiles() * split.blocks_per_tile;
      regions[i].rates = size;
      size += region.blocks();
      if (region.shared == kOwnBlocks) {
        regions[i].parts = size;
        size += parts;
      } else {
        Shared& own = shared[region.shared];
        regions[i].parts = own.parts + own.size;
        own.size += parts;
      }
    });
  }
};

class RegionPacker : public TablePacker {
 public:
  RegionPacker() : TablePacker(kRowWords) {}

  // False, and nothing changed, if the row does not fit beside those already here.
  bool add(const uint64_t* row, const RegionKind& kind, int32_t scalars, const int64_t* layout, int64_t thread_blocks,
           int head, int64_t smem_bytes) {
    const bool shares = rows().size > 0 && scalars == last_scalars_ && layout == last_layout_ && same(kind, last_);
    const int64_t layout_words = kind.ndim * int64_t(1 + kElementRoles);
    if (!fits(thread_blocks, shares ? 0 : kKindWords + layout_words)) return false;
    if (!shares) {
      uint64_t* words = add_kind(kKindWords + layout_words);
      memcpy(words, &kind, sizeof kind);
      if (layout) memcpy(words + kKindWords, layout + 1, layout_words * sizeof(int64_t));
    }
    add_row(row, thread_blocks, 1, head);
    last_ = kind, last_scalars_ = scalars, last_layout_ = layout;
    smem_bytes_ = std::max(smem_bytes_, smem_bytes);
    return true;
  }

  void clear() {
    TablePacker::clear();
    smem_bytes_ = 0;
  }
  size_t smem_bytes() const { return size_t(smem_bytes_); }  // the most that a row needs

 private:
  // But for scalars and layout.
  static bool same(const RegionKind& a, const RegionKind& b) {
    return memcmp(&a.split, &b.split, sizeof a.split) == 0 && a.shared_sum == b.shared_sum && a.offset == b.offset &&
           memcmp(a.dtype, b.dtype, sizeof a.dtype) == 0;
  }

  int64_t smem_bytes_ = 0;
  RegionKind last_ = {};
  int32_t last_scalars_ = 0;
  const int64_t* last_layout_ = nullptr;
};

class Launcher {
 public:
  Launcher(const TensorTable& table, const ScalarsSource& source, const Workspace& places, void* workspace,
           cudaStream_t stream)
      : table_(table), source_(source), places_(places), values_(static_cast<double*>(workspace)), stream_(stream) {}

  Status run(const BlockCopies& copies) {
    elements();
    regions(Way::kOnePass,
            {block_one_pass_kernel<float, 4>, block_one_pass_kernel<float, 8>, block_one_pass_kernel<double, 4>});
    regions(Way::kCoordinates,
            {block_coordinates_kernel<float>, block_coordinates_kernel<float>, block_coordinates_kernel<double>});
    regions(Way::kTwoPasses, {block_sums_kernel<float>, block_sums_kernel<float>, block_sums_kernel<double>});
    shared_sums();
    rates();
    regions(Way::kTwoPasses,
            {block_update_kernel<float, 4>, block_update_kernel<float, 8>, block_update_kernel<double, 4>});
    copy(copies);
    return status_;
  }

 private:
  // Blocks of one coordinate are AdamW's elements; the roles agree.
  void elements() {
    std::vector<TensorRow> rows;
    for_each_region(table_, [&](const TensorRow& row, const BlockRegion& region, int64_t) {
      if (way_of(row, region) != Way::kElements) return;
      TensorRow& own = rows.emplace_back(row);
      for (int role = 0; role < kElementRoles; ++role) own.data[role] = data_of(row, role, region.offset);
      own.data[Role::kBlockSq] = data_of(row, Role::kBlockSq, region.first_block);
      own.numel = region.columns;
    });
    if (!rows.empty())
      status_ = launch_adamw({rows.data(), nullptr, nullptr, 0, int64_t(rows.size()), Role::kCount}, source_, stream_);
  }

  // Runs kernels over the tiles of all regions that go this way, each over the regions of its own width class.
  void regions(Way way, std::array<RowKernel*, kWidthClasses> kernels) {
    for (int width = 0; width < kWidthClasses; ++width)
      each_row(
          kernels[width], [](const BlockSplit& split) { return split.tiles(); },
          [&](const TensorRow& row, const BlockRegion& region) {
            return way_of(row, region) == way && width_class(row) == width;
          });
  }
  void rates() {
    each_row(
        block_rates_kernel,
        [](const BlockSplit& split) {
          const int64_t rates = rates_per_thread_block(split);
          return (split.blocks() + rates - 1) / rates;
        },
        [](const TensorRow& row, const BlockRegion& region) { return way_of(row, region) == Way::kTwoPasses; });
  }

  template <typename Kernel, typename ThreadBlocks, typename Chosen>
  void each_row(Kernel* kernel, ThreadBlocks thread_blocks, Chosen chosen) {
    RegionPacker packer;
    const auto launch_these = [&] {
      status_ = launch_packed(kernel, packer.rows(), stream_, kBlockThreads, packer.smem_bytes());
      packer.clear();
    };
    for_each_region(table_, [&](const TensorRow& row, const BlockRegion& region, int64_t i) {
      if (!status_ || !chosen(row, region) || add(packer, row, region, i, thread_blocks)) return;
      launch_these();
      if (status_ && !add(packer, row, region, i, thread_blocks))
        status_ = {"an array has too many elements or more than 1000 dimensions"};
    });
    if (status_) launch_these();
  }

  template <typename ThreadBlocks>
  bool add(RegionPacker& packer, const TensorRow& row, const BlockRegion& region, int64_t i,
           ThreadBlocks thread_blocks) const {
    const int64_t* layout = row.layout == kFlat ? nullptr : table_.layouts + row.layout;
    RegionKind kind = {};
    kind.scalars = source_.record<double>(row.scalars);
    kind.split = split_of(row, region);
    if (region.shared != kOwnBlocks) {
      kind.shared_sum = values_ + places_.shared_sums + region.shared;
      kind.shared_count = places_.shared[region.shared].count;
    }
    if (layout) kind.offset = region.offset, kind.ndim = int32_t(layout[0]);
    memcpy(kind.dtype, row.dtype, sizeof kind.dtype);
    TensorRow begin = row;
    for (int role = 0; role < kElementRoles; ++role) begin.data[role] = data_of(row, role, layout ? 0 : region.offset);
    uint64_t words[kRowWords] = {};
    for (int role = 0; role < kElementRoles; ++role) words[role] = address_of(begin, role);
    words[kBlockSq] = reinterpret_cast<uintptr_t>(data_of(row, Role::kBlockSq, region.first_block));
    words[kRates] = reinterpret_cast<uintptr_t>(values_ + places_.regions[i].rates);
    words[kParts] = reinterpret_cast<uintptr_t>(values_ + places_.regions[i].parts);
    const int head = layout ? 0 : head_of(begin, kElementRoles);
    const bool staged = way_of(row, region) == Way::kOnePass;
    const int64_t smem_bytes = staged ? staged_elements(kind.split) * arithmetic_bytes(row) : 0;
    return packer.add(words, kind, row.scalars, layout, thread_blocks(kind.split), head, smem_bytes);
  }

  void shared_sums() {
    std::vector<SharedParts> shared;
    for (const Workspace::Shared& own : places_.shared)
      if (own.size > 0)
        shared.push_back(
            {values_ + own.parts, own.size, values_ + places_.shared_sums + (&own - places_.shared.data())});
    if (!status_) return;
    status_ = launch_batches(shared.data(), int64_t(shared.size()), [&](const auto& batch, dim3, int64_t) {
      return launch(shared_sums_kernel, dim3(unsigned(batch.size)), dim3(kBlockThreads), 0, stream_, batch);
    });
  }

  void copy(const BlockCopies& copies) {
    std::vector<ValueCopy> values;
    for (const BlockCopy* own = copies.data; own < copies.data + copies.size; ++own)
      if (own->shared < int64_t(places_.shared.size()) && places_.shared[own->shared].value)
        values.push_back({own->value, places_.shared[own->shared].value});
    if (!status_) return;
    status_ = launch_batches(values.data(), int64_t(values.size()), [&](const auto& batch, dim3 grid, int64_t) {
      return launch(copy_values_kernel, grid, dim3(kThreads), 0, stream_, batch, source_.prepared);
    });
  }

  static void* data_of(const TensorRow& row, int role, int64_t element) {
    return static_cast<char*>(row.data[role]) + element * size_of(row.dtype[role]);
  }

  const TensorTable& table_;
  const ScalarsSource source_;
  const Workspace& places_;
  double* const values_;
  const cudaStream_t stream_;
  Status status_;
};

}  // namespace

int64_t blockwise_adam_workspace_bytes(const TensorTable& table, int64_t options) {
  return Workspace(table, options).size * int64_t(sizeof(double));
}

Status launch_blockwise_adam(const TensorTable& table, const AdamWScalars<double>* scalars, BlockCopies copies,
                             void* workspace, cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;
  const Workspace places(table, 0);
  return Launcher(table, {scalars, nullptr}, places, workspace, stream).run(copies);
}

Status launch_blockwise_adam_capturable(const TensorTable& table, const AdamWDeviceOptions* options,
                                        int64_t options_size, const DeviceNumber* counters, int64_t counters_size,
                                        const AdamWLossScale& loss_scale, BlockCopies copies, void* workspace,
                                        cudaStream_t stream) {
  if (const Status status = check_alignment(table); !status) return status;  // before any counter moves
  const Workspace places(table, options_size);
  auto* prepared = static_cast<PreparedScalars*>(workspace);
  const Status status =
      launch_prepare_scalars(options, options_size, counters, counters_size, loss_scale, prepared, stream);
  if (!status) return status;
  return Launcher(table, {nullptr, prepared}, places, workspace, stream).run(copies);
}

}  // namespace fusedopt::cuda
