// Muon on the CPU: a wave of matrices on its way through a step, and the launcher.
#pragma once
#include "common/muon.h"
#include "common/status.h"
#include "common/tensor_table.h"
#include "math/muon.h"

namespace fusedopt {

constexpr int64_t kNorMuonChunk = 64;  // lines that normuon_sums takes at most at once

// Matrices [first, last) on their way through a step, numbered by elements and, for NorMuon, by lines of statistics.
struct MuonWave {
  const TensorTable& table;
  const MuonScalars<double>* scalars;  // by TensorRow::scalars
  const MuonMatrix* matrices;
  int64_t first, last;
  const int64_t *element_starts, *line_starts;  // last - first + 1 each
  void* values;                                 // u, then o
  double* lines;                                // sums of squares, then scales; nullptr for Muon
  bool wide;                                    // values are double, else float
};

namespace cpu {

// The table is row-major (TableBuilder) and has MuonRole's roles, kRowSq for NorMuon alone. The workspace is of this
// size, aligned for 64 bytes; its content does not matter.
int64_t muon_workspace_bytes(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int threads);
Status launch_muon(const TensorTable& table, const MuonScalars<double>* scalars, const MuonMatrix* matrices,
                   const MuonRun* runs, int64_t count, void* workspace, int threads);

}  // namespace cpu
}  // namespace fusedopt
