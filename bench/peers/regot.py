"""regot, by the authors of SSNS and SPLR: entropic optimal transport in C++ with Eigen."""

from __future__ import annotations

import math
from typing import Any

from bench.peers import TransportPeer

# Iterations after which a solver that has not converged is stopped: some would take minutes.
_MOST = {
    "ssns": 1000,
    "splr": 1000,
    "newton": 60,
    "sparse_newton": 50,
    "lbfgs_dual": 200,
    "bcd": 50,
    "apdagd": 50,
}


def sinkhorn_newton_sparse() -> list[TransportPeer]:
    """All of its solvers, told our tolerance in their own norm."""
    import numpy as np
    import regot

    def peer(name: str, most: int) -> TransportPeer:
        solver = getattr(regot, f"sinkhorn_{name}")

        def solve(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
            tol /= math.sqrt(sum(cost.shape))
            return solver(np.asfortranarray(cost), a, b, reg, tol=tol, max_iter=most).plan

        return TransportPeer(f"regot {name}", solve)

    return [peer(name, most) for name, most in _MOST.items()]
