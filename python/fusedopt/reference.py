"""Float64 NumPy references under the names of the functional steps: pure, returning new arrays."""

from fusedopt.references.adamw import AdamWResult, adamw_step
from fusedopt.references.blockwise_adam import BlockwiseAdamResult, blockwise_adam_step
from fusedopt.references.muon import MuonResult, NorMuonResult, muon_step, normuon_step
from fusedopt.references.newton_schulz import newton_schulz
from fusedopt.references.sinkhorn_knopp import sinkhorn_knopp
from fusedopt.references.sinkhorn_newton_sparse import (
    SinkhornResult,
    sinkhorn_newton_sparse,
)

__all__ = [
    "AdamWResult",
    "BlockwiseAdamResult",
    "MuonResult",
    "NorMuonResult",
    "SinkhornResult",
    "adamw_step",
    "blockwise_adam_step",
    "muon_step",
    "newton_schulz",
    "normuon_step",
    "sinkhorn_knopp",
    "sinkhorn_newton_sparse",
]
