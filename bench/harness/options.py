"""The options of a run, the same for every benchmark."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bench.harness.machine import cpu_count

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class Options:
    """What to run; ``rounds`` and ``peers`` are ``None`` for the benchmark's own choice."""

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    rounds: int | None
    peers: tuple[str, ...] | None
    quick: bool
    out: Path | None

    @classmethod
    def from_arguments(cls, given: argparse.Namespace, benchmark: ModuleType) -> Options:
        """Fill what was not given; a narrowed run gets no default output folder."""
        narrowed = given.quick or any(
            (given.cases, given.dtypes, given.threads, given.rounds, given.peers)
        )
        default = benchmark.QUICK if given.quick else {}
        counts = tuple(count for count in (1, 2) if count <= cpu_count())
        return cls(
            cases=given.cases or default.get("cases", tuple(benchmark.CASES)),
            dtypes=given.dtypes or default.get("dtypes", tuple(benchmark.VARIANTS)),
            threads=given.threads or (counts[:1] if given.quick else counts),
            rounds=given.rounds or default.get("rounds"),
            peers=given.peers or default.get("peers"),
            quick=given.quick,
            out=given.out or (None if narrowed else RESULTS),
        )
