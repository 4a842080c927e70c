"""Dao-AILab's Gram Newton–Schulz with quack's kernels, on a GPU."""

from __future__ import annotations

import inspect

from bench.peers import MatrixFunctionPeer
from bench.peers.torch import JORDAN


def newton_schulz_gpu() -> list[MatrixFunctionPeer]:
    """Its Gram form, which computes in float16; Jordan's coefficients restart before step 3."""
    from gram_newton_schulz import GramNewtonSchulz

    names = inspect.signature(GramNewtonSchulz).parameters  # the restarts' name has changed
    restarts = next(name for name in names if name.endswith("reset_iterations"))
    run = GramNewtonSchulz(ns_coefficients=[list(JORDAN)] * 5, **{restarts: [3]})
    return [MatrixFunctionPeer("gram-newton-schulz", run, "fp16")]
