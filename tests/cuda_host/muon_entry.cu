// Lets test_muon.py call the CUDA launcher of Muon: table, matrices and options from arrays, by address. Newton-Schulz
// is whatever the test does to the matrices in place of it.
#include <vector>

#include "cuda/muon.h"
#include "cuda/newton_schulz.h"

using namespace fusedopt;

namespace {

struct Arrays {  // as test_muon.py declares it
  int64_t size;
  void* const* data;     // [size][kMaxRoles]
  const uint8_t* dtype;  // [size][kMaxRoles]
  const int64_t* numel;
  const int64_t* layout;
  const int64_t* layouts;
  int64_t layouts_size;
  int64_t roles;
  const cuda::MuonDeviceOptions* options;  // [size]
  cuda::AdamWLossScale loss_scale;
  const MuonMatrix* matrices;  // those of float64 last
  int64_t narrow, count;
};

void (*orthogonalize)(const NewtonSchulzMatrix*, int64_t) = nullptr;

std::vector<MuonRun> runs_of(const Arrays& a) {
  std::vector<MuonRun> runs;
  if (a.narrow > 0) runs.push_back({0, a.narrow, {}, false});
  if (a.narrow < a.count) runs.push_back({a.narrow, a.count, {}, true});
  return runs;
}

}  // namespace

namespace fusedopt::cuda {

int64_t newton_schulz_workspace_bytes(const NewtonSchulzMatrix*, int64_t count, const NewtonSchulzSchedule&) {
  return 7 * count;
}
Status launch_newton_schulz(const NewtonSchulzMatrix* matrices, int64_t count, const NewtonSchulzSchedule&,
                            void* workspace, cudaStream_t) {
  memset(workspace, 0xEE, 7 * count);  // it may do so
  orthogonalize(matrices, count);
  return {};
}

}  // namespace fusedopt::cuda

extern "C" void muon_orthogonalize(void (*function)(const NewtonSchulzMatrix*, int64_t)) { orthogonalize = function; }

extern "C" double muon_scale(int scale, double outputs, double inputs) {
  return generic::muon_scale(MuonScale(scale), outputs, inputs);
}

extern "C" int64_t muon_workspace(const Arrays* a) {
  const std::vector<MuonRun> runs = runs_of(*a);
  return cuda::muon_workspace_bytes(a->matrices, runs.data(), int64_t(runs.size()), a->size,
                                    a->roles > MuonRole::kRowSq);
}

extern "C" const char* muon(const Arrays* a, void* workspace, cudaStream_t stream) {
  std::vector<TensorRow> rows;
  for (int64_t i = 0; i < a->size; ++i) {
    TensorRow row = {};
    for (int role = 0; role < kMaxRoles; ++role) {
      row.data[role] = a->data[i * kMaxRoles + role];
      row.dtype[role] = DType(a->dtype[i * kMaxRoles + role]);
    }
    row.numel = a->numel[i];
    row.layout = a->layout[i];
    const bool shares = i > 0 && memcmp(&a->options[i], &a->options[i - 1], sizeof *a->options) == 0;
    row.scalars = shares ? rows.back().scalars : int32_t(i);  // as neighbours do
    rows.push_back(row);
  }
  const TensorTable table = {rows.data(), nullptr, a->layouts, a->layouts_size, a->size, int(a->roles)};
  const std::vector<MuonRun> runs = runs_of(*a);
  return cuda::launch_muon(table, a->options, a->size, a->loss_scale, a->matrices, runs.data(), int64_t(runs.size()),
                           workspace, stream)
      .error;
}
