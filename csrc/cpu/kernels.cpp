// One instruction set's row: compiled once for each, like the kernels.
#include "cpu/kernels.h"

#include "cpu/entries.h"

namespace fusedopt::FUSEDOPT_TARGET {

extern const CpuKernels kernels;
const CpuKernels kernels = {
    adamw_update,
    blockwise_adam_sums,
    blockwise_adam_rates,
    blockwise_adam_update,
    newton_schulz,
    newton_schulz_bytes,
    muon_before,
    normuon_sums,
    normuon_scales,
    muon_after,
    transport_workspace_bytes,
    transport_inspect,
    transport_solve,
    transport_tiny,
    transport_adjoint,
    sinkhorn_knopp,
};

}  // namespace fusedopt::FUSEDOPT_TARGET
