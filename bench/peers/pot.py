"""POT: Sinkhorn's scaling, the exact network simplex, and its batch solver."""

from __future__ import annotations

import math
from typing import Any

from bench.peers import TransportPeer


def sinkhorn_newton_sparse() -> list[TransportPeer]:
    """``ot.sinkhorn``, ``ot.emd`` (exact, another problem) and ``ot.batch`` where it has that."""
    import ot

    def sinkhorn(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
        tol /= math.sqrt(sum(cost.shape))
        return ot.sinkhorn(a, b, cost, reg, numItermax=30000, stopThr=tol, warn=False)

    def emd(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
        return ot.emd(a, b, cost)

    def batch(cost: Any, a: Any, b: Any, reg: float, tol: float) -> Any:
        return ot.batch.solve_batch(cost, reg, a, b, max_iter=10000, tol=tol).plan

    peers = [TransportPeer("POT sinkhorn", sinkhorn), TransportPeer("ot.emd", emd, exact=True)]
    if hasattr(ot, "batch"):
        peers.append(TransportPeer("POT batch", batch, batched=True))
    return peers
