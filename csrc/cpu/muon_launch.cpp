#include <vector>

#include "cpu/isa.h"
#include "cpu/muon.h"
#include "cpu/newton_schulz.h"
#include "cpu/threads.h"

namespace fusedopt::cpu {
namespace {

constexpr int64_t kWave = 1 << 24;  // elements: enough for all threads
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t elements_of(const MuonMatrix* matrices, int64_t first, int64_t last) {
  int64_t elements = 0;
  for (int64_t i = first; i < last; ++i) elements += matrices[i].numel();
  return elements;
}
int64_t lines_of(const MuonMatrix* matrices, int64_t first, int64_t last) {
  int64_t lines = 0;
  for (int64_t i = first; i < last; ++i) lines += matrices[i].lines();
  return lines;
}

struct Workspace {  // bytes of its parts, in their order
  int64_t starts = 0, products = 0, lines = 0, values = 0;

  Workspace(const MuonMatrix* matrices, const MuonRun* runs, int64_t count) {
    for_each_muon_wave(matrices, runs, count, kWave, [&](const MuonRun& run, int64_t first, int64_t last) {
      starts = larger(starts, aligned(2 * (last - first + 1) * sizeof(int64_t)));
      products = larger(products, aligned((last - first) * sizeof(NewtonSchulzMatrix)));
      lines = larger(lines, aligned(lines_of(matrices, first, last) * sizeof(double)));
      values =
          larger(values, aligned(elements_of(matrices, first, last) * (run.wide ? sizeof(double) : sizeof(float))));
    });
  }
  int64_t bytes() const { return starts + products + lines + values; }
};

void number(const MuonMatrix* matrices, int64_t first, int64_t last, int64_t* elements, int64_t* lines) {
  elements[0] = lines[0] = 0;
  for (int64_t i = 0; i < last - first; ++i) {
    elements[i + 1] = elements[i] + matrices[first + i].numel();
    lines[i + 1] = lines[i] + matrices[first + i].lines();
  }
}

void describe_products(const MuonMatrix* matrices, int64_t first, int64_t last, bool wide, char* values,
                       NewtonSchulzMatrix* products) {
  const DType dtype = wide ? DType::kFloat64 : DType::kFloat32;
  for (int64_t i = first; i < last; values += matrices[i++].numel() * size_of(dtype)) {
    const MuonMatrix& m = matrices[i];
    products[i - first] = {values, values, m.rows, m.columns, m.columns, m.columns, dtype, dtype};
  }
}

void scale_rows(const MuonWave& wave, int64_t lines, int threads) {
  const CpuKernels& kernels = cpu_kernels();
  constexpr int64_t kLines = kNorMuonChunk;
  parallel_for((lines + kLines - 1) / kLines, threads, [&](int64_t i) {
    kernels.normuon_sums(wave, i * kLines, (i + 1) * kLines < lines ? (i + 1) * kLines : lines);
  });
  parallel_for(wave.last - wave.first, threads, [&](int64_t i) { kernels.normuon_scales(wave, i, i + 1); });
}

}  // namespace

int64_t muon_workspace_bytes(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int threads) {
  int64_t products = 0;
  std::vector<NewtonSchulzMatrix> shapes;
  for_each_muon_wave(matrices, runs, count, kWave, [&](const MuonRun& run, int64_t first, int64_t last) {
    shapes.resize(last - first);
    describe_products(matrices, first, last, run.wide, nullptr, shapes.data());
    products = larger(products, newton_schulz_workspace_bytes(shapes.data(), last - first, run.schedule, threads));
  });
  return Workspace(matrices, runs, count).bytes() + products;
}

Status launch_muon(const TensorTable& table, const MuonScalars<double>* scalars, const MuonMatrix* matrices,
                   const MuonRun* runs, int64_t count, void* workspace, int threads) {
  const CpuKernels& kernels = cpu_kernels();
  const Workspace sizes(matrices, runs, count);
  char* const starts = static_cast<char*>(workspace);
  auto* const products = reinterpret_cast<NewtonSchulzMatrix*>(starts + sizes.starts);
  char* const lines = starts + sizes.starts + sizes.products;
  char* const values = lines + sizes.lines;
  const bool normuon = table.roles > MuonRole::kRowSq;
  Status status;
  for_each_muon_wave(matrices, runs, count, kWave, [&](const MuonRun& run, int64_t first, int64_t last) {
    if (!status) return;
    const int64_t n = elements_of(matrices, first, last);
    auto* const element_starts = reinterpret_cast<int64_t*>(starts);
    int64_t* const line_starts = element_starts + (last - first + 1);
    number(matrices, first, last, element_starts, line_starts);
    describe_products(matrices, first, last, run.wide, values, products);
    const MuonWave wave = {table,       scalars, matrices,
                           first,       last,    element_starts,
                           line_starts, values,  normuon ? reinterpret_cast<double*>(lines) : nullptr,
                           run.wide};
    parallel_elements(0, n, threads, [&](int64_t begin, int64_t end) { kernels.muon_before(wave, begin, end); });
    status = launch_newton_schulz(products, last - first, run.schedule, values + sizes.values, threads);
    if (!status) return;
    if (normuon) scale_rows(wave, lines_of(matrices, first, last), threads);
    parallel_elements(0, n, threads, [&](int64_t begin, int64_t end) { kernels.muon_after(wave, begin, end); });
  });
  return status;
}

}  // namespace fusedopt::cpu
