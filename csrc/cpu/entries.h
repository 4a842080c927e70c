// The functions behind one instruction set's row of cpu/kernels.h, by the names of its members.
#pragma once
#include "cpu/kernels.h"
#include "math/target.h"

namespace fusedopt::FUSEDOPT_TARGET {

void adamw_update(const TensorTable& table, const AdamWScalars<double>* scalars, int64_t begin, int64_t end);

void blockwise_adam_sums(const TensorTable& table, const BlockSums& sums, int64_t begin, int64_t end);
void blockwise_adam_rates(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                          int64_t first_row, int64_t last_row);
void blockwise_adam_update(const TensorTable& table, const AdamWScalars<double>* scalars, const BlockSums& sums,
                           int64_t begin, int64_t end);

void newton_schulz(const NewtonSchulzTask& task, void* workspace, int threads);
int64_t newton_schulz_bytes(int64_t rows, int64_t columns, DType arithmetic, bool gram);
void muon_before(const MuonWave& wave, int64_t begin, int64_t end);
void normuon_sums(const MuonWave& wave, int64_t begin, int64_t end);
void normuon_scales(const MuonWave& wave, int64_t begin, int64_t end);
void muon_after(const MuonWave& wave, int64_t begin, int64_t end);
int64_t transport_workspace_bytes(int64_t n, int64_t m, bool low_memory);
CostSummary transport_inspect(const TransportProblem& problem, int64_t begin, int64_t end, double* reached);
void transport_solve(const TransportProblem& problem, TransportResult* result, void* workspace);
void transport_tiny(const TinyTransports& all, int64_t begin, int64_t end);
void transport_adjoint(const TransportProblem& problem, const double* g, TransportAdjoint* adjoint, void* workspace);
void sinkhorn_knopp(const KnoppTask& task, int64_t begin, int64_t end);

}  // namespace fusedopt::FUSEDOPT_TARGET
