// Muon on the CPU: the matrices that a step works on, how they go through it in waves, and the launcher.
#pragma once
#include "common/status.h"
#include "common/tensor_table.h"
#include "cpu/newton_schulz.h"
#include "math/muon.h"

namespace fusedopt {

// A matrix that is orthogonalised on its own: a tensor, or a piece of one.
struct MuonMatrix {
  int64_t row;                            // of the table
  int64_t offset, rows, columns, stride;  // among the tensor's elements in row-major order; stride: between rows
  bool by_column;                         // NorMuon's statistics belong to columns
  double rate;                            // muon_rate
  int64_t first_line;                     // of its statistics among the tensor's

  int64_t numel() const { return rows * columns; }
  int64_t lines() const { return by_column ? columns : rows; }
};

struct MuonRun {  // matrices that share a schedule and an arithmetic
  int64_t begin, end;
  NewtonSchulzSchedule schedule;
  bool wide;  // double: for parameters of float64
};

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
