"""What the lab measures and checks: a row for each algorithm. Standard library only.

A name in ``BENCHMARKS`` is a module of this package with a ``BENCHMARK`` (``measure.py`` says what
that is); one in ``CHECKS`` is a row of ``checks.ALGORITHMS``.
"""

from __future__ import annotations

BENCHMARKS = {  # seconds
    "adamw": 55.0,
    "blockwise_adam": 20.0,
    "newton_schulz": 40.0,
    "muon": 15.0,
    "sinkhorn_newton_sparse": 25.0,
}
CHECKS = ("adamw", "blockwise_adam", "muon")
