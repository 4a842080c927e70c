// What Muon's launchers have in common: the matrices that a step works on, and how they go through it in waves.
#pragma once
#include <cstdint>

#include "common/newton_schulz.h"

namespace fusedopt {

// A matrix that is orthogonalised on its own: a tensor, or a piece of one.
struct MuonMatrix {
  int64_t row;                            // of the table
  int64_t offset, rows, columns, stride;  // among the tensor's elements in row-major order; stride: between rows
  bool by_column;                         // NorMuon's statistics belong to columns
  double scale;                           // muon_scale
  int64_t first_line;                     // of its statistics among the tensor's

  int64_t numel() const { return rows * columns; }
  int64_t lines() const { return by_column ? columns : rows; }
  bool joined() const { return stride == columns; }
};

struct MuonRun {  // matrices that share a schedule and an arithmetic
  int64_t begin, end;
  NewtonSchulzSchedule schedule;
  bool wide;  // double: for parameters of float64
};

// Matrices go through a step in waves of at most so many elements, or one larger matrix: what they need beside their
// tensors is bounded. Calls f(run, first, last) for every wave.
template <typename F>
void for_each_muon_wave(const MuonMatrix* matrices, const MuonRun* runs, int64_t count, int64_t elements, F f) {
  for (const MuonRun* run = runs; run < runs + count; ++run)
    for (int64_t first = run->begin, last; first < run->end; first = last) {
      int64_t n = 0;
      for (last = first; last < run->end && (last == first || n + matrices[last].numel() <= elements); ++last)
        n += matrices[last].numel();
      f(*run, first, last);
    }
}

}  // namespace fusedopt
