// Runs every pair of instruction sets on the same arrays and compares the bits: all dtypes, tails, NaN, subnormals.
// argv: none. Prints what differs; exit status 1 if anything does, or if nothing was compared.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/muon.h"
#include "cpu/newton_schulz.h"
#include "math/blockwise_adam.h"
#include "math/storage.h"

using namespace fusedopt;

int64_t transports_that_differ(int64_t* compared);  // compare_transport.cpp

namespace {

using Bytes = std::vector<char>;

Bytes random_array(DType dtype, int64_t n, bool positive, bool special, std::mt19937& rng) {
  Bytes bytes(n * size_of(dtype));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) {
    float x = std::ldexp(normal(rng), int(rng() % 30) - 20);
    if (rng() % 40 == 0) x = 1e-40f;
    if (special && rng() % 30 == 0) x = rng() % 2 ? NAN : INFINITY;
    if (positive) x = std::fabs(x);
    char* at = bytes.data() + i * size_of(dtype);
    const double wide = x;
    const uint16_t half = dtype == DType::kBFloat16 ? generic::float_to_bf16(x) : generic::float_to_fp16(x);
    if (dtype == DType::kFloat64)
      memcpy(at, &wide, 8);
    else if (dtype == DType::kFloat32)
      memcpy(at, &x, 4);
    else
      memcpy(at, &half, 2);
  }
  return bytes;
}

std::vector<Bytes> run_blocks(const CpuKernels& kernels, std::vector<Bytes> arrays, const DType* dtypes,
                              const BlockRegion& region, const AdamWScalars<double>& scalars) {
  TensorRow row = {};
  for (size_t r = 0; r < arrays.size(); ++r) {
    row.data[r] = arrays[r].data();
    row.dtype[r] = dtypes[r];
  }
  row.numel = region.numel();
  row.layout = kFlat;
  const int64_t starts[] = {0, row.numel};
  const RowBlocks blocks = {0, 1, region.blocks()};
  TensorTable table = {&row, starts, nullptr, 0, 1, BlockwiseAdamRole::kCount};
  table.blocks = &blocks;
  table.regions = &region;
  const generic::BlockSplit split(region);
  const int64_t place = split.one_pass() ? kOnePass : 0;
  std::vector<double> values(split.values() + 1);
  const BlockSums sums = {&place, values.data(), nullptr};
  for (int step = 0; step < 3; ++step) {
    kernels.blockwise_adam_sums(table, sums, 0, row.numel);
    kernels.blockwise_adam_rates(table, &scalars, sums, 0, 1);
    kernels.blockwise_adam_update(table, &scalars, sums, 0, row.numel);
  }
  return arrays;
}

std::vector<Bytes> run(const CpuKernels& kernels, std::vector<Bytes> arrays, const DType* dtypes, int64_t n,
                       const AdamWScalars<double>& scalars) {
  TensorRow row = {};
  for (size_t r = 0; r < arrays.size(); ++r) {
    row.data[r] = arrays[r].data();
    row.dtype[r] = dtypes[r];
  }
  row.numel = n;
  row.layout = kFlat;
  const int64_t starts[] = {0, n};
  const TensorTable table = {&row, starts, nullptr, 0, 1, AdamWRole::kCount};
  for (int step = 0; step < 3; ++step) kernels.adamw(table, &scalars, 0, n);
  return arrays;
}

Bytes run_newton_schulz(const CpuKernels& kernels, const Bytes& in, int64_t rows, int64_t columns, DType stored,
                        DType rounded, bool gram) {
  Bytes out(in.size());
  const NewtonSchulzMatrix matrix = {in.data(), out.data(), rows, columns, columns, columns, stored, stored};
  const NewtonSchulzStep steps[] = {
      {3.4445, -4.7750, 2.0315, false}, {1.5, -0.5, 0, false}, {1.875, -1.25, .375, true}};
  void* const workspace = aligned_alloc(64, kernels.newton_schulz_bytes(rows, columns, rounded, gram));
  kernels.newton_schulz({&matrix, steps, 3, gram, rounded, rounded}, workspace, 1);
  free(workspace);
  return out;
}

// Both passes of Muon around the products, which are left out: u stands for o. row_sq makes it NorMuon.
std::vector<Bytes> run_muon(const CpuKernels& kernels, std::vector<Bytes> arrays, const DType* dtypes,
                            const MuonMatrix& matrix, const MuonScalars<double>& scalars) {
  TensorRow row = {};
  for (size_t r = 0; r < arrays.size(); ++r) {
    row.data[r] = arrays[r].data();
    row.dtype[r] = dtypes[r];
  }
  row.numel = matrix.numel();
  row.layout = kFlat;
  const int64_t starts[] = {0, row.numel}, line_starts[] = {0, matrix.lines()};
  const TensorTable table = {&row, starts, nullptr, 0, 1, int(arrays.size())};
  std::vector<double> values(row.numel), lines(matrix.lines());
  const bool normuon = arrays.size() > MuonRole::kRowSq;
  const MuonWave wave = {table,
                         &scalars,
                         &matrix,
                         0,
                         1,
                         starts,
                         line_starts,
                         values.data(),
                         normuon ? lines.data() : nullptr,
                         dtypes[0] == DType::kFloat64};
  for (int step = 0; step < 3; ++step) {
    kernels.muon_before(wave, 0, row.numel);
    if (normuon) kernels.normuon_sums(wave, 0, matrix.lines());
    if (normuon) kernels.normuon_scales(wave, 0, 1);
    kernels.muon_after(wave, 0, row.numel);
  }
  return arrays;
}

}  // namespace

int main() {
  std::mt19937 rng(7);
  int64_t compared = 0, different = 0;
  const DType floats[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (DType p : floats)
    for (DType g : floats)
      for (DType s : floats)
        for (int roles = 4; roles <= 5; ++roles)
          for (int64_t n : {1, 3, 15, 16, 31, 32, 33, 63, 64, 65, 255, 1000, 4097})
            for (double beta1 : {0.9, 0.3}) {
              const DType dtypes[] = {p, g, s, s, s};
              std::vector<Bytes> arrays;
              for (int r = 0; r < roles; ++r) arrays.push_back(random_array(dtypes[r], n, r >= 3, r == 1, rng));
              const AdamWOptions options = {1e-2, beta1, 0.99, 1e-8, 0.1, false};
              const auto scalars = generic::adamw_scalars(options, 3, 0.37);
              const bool same =
                  run(avx2::kernels, arrays, dtypes, n, scalars) == run(avx512::kernels, arrays, dtypes, n, scalars);
              ++compared;
              if (same) continue;
              if (++different <= 10)
                printf("differs: param %d grad %d state %d, %d roles, %ld elements, beta1 %g\n", int(p), int(g), int(s),
                       roles, long(n), beta1);
            }
  // Without NaN: where a sum meets two of them, either's sign and payload may go on.
  const BlockRegion regions[] = {{0, 1, 1000, 1000, 1, 0, kOwnBlocks},       {0, 1, 1000, 1000, 3, 0, kOwnBlocks},
                                 {0, 1, 1000, 1000, 64, 0, kOwnBlocks},      {0, 1, 1000, 1000, 700, 0, kOwnBlocks},
                                 {0, 1, 70000, 70000, 66000, 0, kOwnBlocks}, {0, 37, 53, 53, 1, 0, kOwnBlocks},
                                 {0, 37, 53, 53, 7, 0, kOwnBlocks},          {0, 700, 103, 103, 20, 0, kOwnBlocks}};
  for (DType p : floats)
    for (DType g : floats)
      for (DType m : floats)
        for (const BlockRegion& region : regions) {
          const DType dtypes[] = {p, g, m, DType::kFloat32};
          std::vector<Bytes> arrays;
          for (int r = 0; r < 3; ++r) arrays.push_back(random_array(dtypes[r], region.numel(), false, false, rng));
          arrays.push_back(random_array(dtypes[3], region.blocks(), true, false, rng));
          const auto scalars = generic::adamw_scalars({1e-2, 0.9, 0.99, 1e-8, 0.1, false}, 3, 0.37);
          const bool same = run_blocks(avx2::kernels, arrays, dtypes, region, scalars) ==
                            run_blocks(avx512::kernels, arrays, dtypes, region, scalars);
          ++compared;
          if (same) continue;
          if (++different <= 20)
            printf("blocks differ: param %d grad %d moment %d, %ld rows of %ld, groups of %ld\n", int(p), int(g),
                   int(m), long(region.rows), long(region.columns), long(region.group));
        }
  for (DType p : floats)
    for (DType g : floats)
      for (DType m : floats)
        for (int variant = 0; variant < 32; ++variant) {
          const bool by_column = variant & 1, normuon = variant & 2;
          const DType dtypes[] = {p, g, m, DType::kFloat32};
          const MuonMatrix matrix = {0, 0, 37, 53, 53, by_column, -0.02, 0};
          std::vector<Bytes> arrays;
          for (int r = 0; r < 3; ++r) arrays.push_back(random_array(dtypes[r], matrix.numel(), false, false, rng));
          if (normuon) arrays.push_back(random_array(dtypes[3], matrix.lines(), true, false, rng));
          const MuonOptions options = {1e-2,  0.1,  variant & 16 ? 0.3 : 0.95, 0.9, bool(variant & 4),
                                       false, true, bool(variant & 8)};
          const auto scalars = generic::muon_scalars(options, 0.37);
          ++compared;
          if (run_muon(avx2::kernels, arrays, dtypes, matrix, scalars) ==
              run_muon(avx512::kernels, arrays, dtypes, matrix, scalars))
            continue;
          if (++different <= 25)
            printf("Muon differs: param %d grad %d momentum %d, variant %d\n", int(p), int(g), int(m), variant);
        }
  const int64_t shapes[][2] = {{1, 1}, {3, 70}, {9, 9}, {33, 40}, {100, 37}, {130, 300}};
  for (DType stored : floats)
    for (DType rounded : floats)
      for (const auto& [rows, columns] : shapes)
        for (bool gram : {false, true}) {
          const Bytes in = random_array(stored, rows * columns, false, false, rng);
          ++compared;
          if (run_newton_schulz(avx2::kernels, in, rows, columns, stored, rounded, gram) ==
              run_newton_schulz(avx512::kernels, in, rows, columns, stored, rounded, gram))
            continue;
          if (++different <= 30)
            printf("Newton-Schulz differs: %d rounded to %d, %ld x %ld, gram %d\n", int(stored), int(rounded),
                   long(rows), long(columns), int(gram));
        }
  different += transports_that_differ(&compared);
  printf("%ld compared, %ld differ\n", long(compared), long(different));
  return different != 0 || compared == 0;
}
