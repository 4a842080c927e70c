// What every instruction set offers, as a table of functions; cpu/isa.h picks one table at run time.
#pragma once
#include "common/status.h"
#include "common/tensor_table.h"
#include "math/adamw.h"

namespace fusedopt {

struct BlockSums;
struct NewtonSchulzTask;
struct MuonWave;
struct CostSummary;
struct KnoppTask;
struct TinyTransports;
struct TransportAdjoint;
struct TransportProblem;
struct TransportResult;

// Ranges [begin, end) are of the table's elements, counted over all its rows; scalars are indexed by
// TensorRow::scalars.
struct CpuKernels {
  void (*adamw)(const TensorTable& table, const AdamWScalars<double>* scalars, int64_t begin, int64_t end);
  // The three passes of cpu/blockwise_adam.cpp; a block belongs to the range in which it begins.
  void (*blockwise_adam_sums)(const TensorTable& table, const BlockSums& sums, int64_t begin, int64_t end);
  void (*blockwise_adam_rates)(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                               int64_t first_row, int64_t last_row);
  void (*blockwise_adam_update)(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                                int64_t begin, int64_t end);
  // One matrix that is not empty, and the size of its workspace.
  void (*newton_schulz)(const NewtonSchulzTask& task, void* workspace, int threads);
  int64_t (*newton_schulz_bytes)(int64_t rows, int64_t columns, DType arithmetic, bool gram);
  // The passes of cpu/muon.cpp; ranges are of a wave's elements, of its lines of statistics and of its matrices.
  void (*muon_before)(const MuonWave& wave, int64_t begin, int64_t end);
  void (*normuon_sums)(const MuonWave& wave, int64_t begin, int64_t end);
  void (*normuon_scales)(const MuonWave& wave, int64_t begin, int64_t end);
  void (*muon_after)(const MuonWave& wave, int64_t begin, int64_t end);
  // Entropic optimal transport (cpu/sinkhorn_newton_sparse): the workspace is of this size, aligned to 64 bytes.
  int64_t (*transport_workspace_bytes)(int64_t n, int64_t m, bool low_memory);
  // Rows [begin, end); `reached` (m, zeros at first) is not zero in columns that they can send mass to.
  CostSummary (*transport_inspect)(const TransportProblem& problem, int64_t begin, int64_t end, double* reached);
  void (*transport_solve)(const TransportProblem& problem, TransportResult* result, void* workspace);
  // Problems [begin, end) of those.
  void (*transport_tiny)(const TinyTransports& all, int64_t begin, int64_t end);
  // At the plan of g; the workspace is that of low_memory = false.
  void (*transport_adjoint)(const TransportProblem& problem, const double* g, TransportAdjoint* adjoint,
                            void* workspace);
  // Matrices [begin, end) of a batch (cpu/sinkhorn_knopp.h).
  void (*sinkhorn_knopp)(const KnoppTask& task, int64_t begin, int64_t end);
};

namespace avx512_bf16 {  // beside avx512's
void newton_schulz(const NewtonSchulzTask& task, void* workspace, int threads);
int64_t newton_schulz_bytes(int64_t rows, int64_t columns, DType arithmetic, bool gram);
}  // namespace avx512_bf16
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace portable {
extern const CpuKernels kernels;
}

}  // namespace fusedopt
