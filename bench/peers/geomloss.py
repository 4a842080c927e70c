"""geomloss's solvers of a given cost matrix: averaged updates, annealed."""

from __future__ import annotations

from typing import Any

from bench.peers import TransportPeer

_MOST = 100  # iterations: it has not been seen to come near 1e-8 with any number


def sinkhorn_newton_sparse() -> list[TransportPeer]:
    """``geomloss.ot.solve`` and ``solve_batch`` (from version 0.3 on)."""
    import torch
    from geomloss import ot

    def peer(name: str, batched: bool) -> TransportPeer:
        def solve(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
            matrix, first, second = (torch.from_numpy(x) for x in (cost, a, b))
            result = getattr(ot, name)(matrix, reg=reg, a=first, b=second, max_iter=_MOST)
            return result.plan.numpy()

        return TransportPeer(f"geomloss {name}", solve, batched=batched)

    return [peer("solve", False), peer("solve_batch", True)]
