"""What the lab measures and checks: a row for each algorithm. Standard library only.

A name in ``BENCHMARKS`` is a module of this package with a ``BENCHMARK`` (``measure.py`` says what
that is); one in ``CHECKS`` is a row of ``checks.ALGORITHMS``.
"""

from __future__ import annotations

BENCHMARKS = {"adamw": 80.0, "blockwise_adam": 35.0}  # seconds
CHECKS = ("adamw", "blockwise_adam")
