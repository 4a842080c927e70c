"""Optimal transport in the calling style of POT (``import ot``) and of geomloss's ``SamplesLoss``.

Entropic problems only, solved by ``fusedopt.sinkhorn_newton_sparse`` to 1e-8 in both marginals;
exact answers on a line alone. Arrays of NumPy or torch (with gradients), one problem, a batch
``(problems, n, m)`` or a list.
"""

from fusedopt.ot._line import wasserstein, wasserstein_1d
from fusedopt.ot._samples import SamplesLoss, dist, sinkhorn_divergence, solve_sample
from fusedopt.ot._solve import OTResult, sinkhorn, sinkhorn2, solve, unif

__all__ = [
    "OTResult",
    "SamplesLoss",
    "dist",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_divergence",
    "solve",
    "solve_sample",
    "unif",
    "wasserstein",
    "wasserstein_1d",
]
