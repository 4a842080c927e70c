"""ott-jax: Sinkhorn in the log domain, compiled by XLA, in float64 with momentum."""

from __future__ import annotations

from typing import Any

from bench.peers import TransportPeer

_MOST = 2000  # iterations: some problems would take minutes


def sinkhorn_newton_sparse() -> list[TransportPeer]:
    """Its ``Sinkhorn``, told our tolerance; ``lse_mode``, as small ``reg`` needs."""
    import jax
    import numpy as np
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    jax.config.update("jax_enable_x64", True)

    @jax.jit
    def compiled(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
        problem = linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=reg), a, b)
        return sinkhorn.Sinkhorn(threshold=tol, max_iterations=_MOST)(problem).matrix

    def solve(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
        return np.asarray(compiled(cost, a, b, reg, tol))

    return [TransportPeer("ott-jax sinkhorn", solve, compiles=True)]
