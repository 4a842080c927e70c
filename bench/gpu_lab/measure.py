"""Benchmarks on a GPU: contestants interleaved, times between CUDA events with cold L2.

The floor is a copy of the same bytes. Every contestant is checked before it is timed; wall times
are those of calls without a pause.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.gpu_lab.device import Device
from bench.harness import report
from bench.harness.timing import Case, Contestant, Row

COPY = "copy"
ROUNDS = 15
_SLOW = 0.02  # seconds; a slower contestant takes part in fewer rounds
_FEW = 3
_BURST = 0.05  # seconds of calls without a pause that a wall time is taken over


class GpuCase(Case):
    """A case that has no threads to tell of."""

    @property
    def title(self) -> str:
        """What a person calls this case."""
        return f"{self.name} · {self.variant}"


@dataclass(frozen=True)
class Goal:
    """By how many times our time a contestant's is to be, in one case."""

    case: str
    variant: str  # its title
    against: str
    time: str  # "median_ms" or "wall_ms"
    wanted: float
    ours: str = "fusedopt"


@dataclass(frozen=True)
class Benchmark:
    """What one algorithm's step of the lab measures.

    ``cases``: (name, variant), the most important first, since time may run out. ``build`` makes
    one of them on a device.
    """

    cases: Sequence[tuple[str, str]]
    build: Callable[[Device, str, str], GpuCase]
    goals: Sequence[Goal]


def run(name: str, benchmark: Benchmark, device: Device, out: Path, seconds: float | None) -> None:
    """Measure case after case, writing after each; begin none after so many seconds.

    Raises:
        SystemExit: an answer of ours is wrong, or something of ours did not run.
    """
    start, console = time.monotonic(), Console(width=160)
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case, variant in benchmark.cases:
        if seconds is not None and time.monotonic() - start > seconds:
            left_out.append(f"{case} {variant}")
            continue
        results.append(_measure(device, benchmark.build(device, case, variant)))
        report.print_case(console, results[-1])
        _write(out / f"{name}.json", benchmark, results, left_out)
    _write(out / f"{name}.json", benchmark, results, left_out)
    report.print_summary(console, results)
    if complaints := [complaint for result in results for complaint in _about_ours(result)]:
        raise SystemExit("\n".join(complaints))


def _about_ours(result: dict[str, Any]) -> list[str]:
    """Our own wrong answers, and what of ours did not run. A peer's are no failure of this step."""
    said = {row["name"]: f"wrong answers: {row['wrong']}" for row in result["rows"] if row["wrong"]}
    said |= {name: f"not run: {why}" for name, why in result["not_run"].items()}
    return [f"{result['title']}, {k}: {v}" for k, v in said.items() if k.startswith("fusedopt")]


def _write(
    path: Path, benchmark: Benchmark, results: list[dict[str, Any]], left_out: list[str]
) -> None:
    rates = [row["rate"] for r in results for row in r["rows"] if row["name"] == COPY]
    record = {
        "copy_gb_per_s": max(rates, default=0.0),
        "goals": [_reached(results, goal) for goal in benchmark.goals],
        "left_out": left_out,
        "cases": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _reached(results: list[dict[str, Any]], goal: Goal) -> dict[str, Any]:
    value = None
    for result in results:
        if (result["case"], result["variant"]) == (goal.case, goal.variant):
            times = {row["name"]: row[goal.time] for row in result["rows"] if not row["wrong"]}
            if goal.against in times and goal.ours in times:
                value = times[goal.against] / times[goal.ours]
    kind = goal.time.removesuffix("_ms")
    return {
        "what": f"{goal.case} {goal.variant}: time of {goal.against} over ours ({kind})",
        "wanted": goal.wanted,
        "value": value,
        "reached": None if value is None else value >= goal.wanted,
    }


# ---- one case


def copy_of(gigabytes: float, device: Device) -> Contestant:
    """Reads and writes so much together, half of it each."""
    half = int(gigabytes * 1e9) // 2
    source = torch.zeros(half, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    return Contestant(COPY, lambda: target.copy_(source))


def _measure(device: Device, case: GpuCase) -> dict[str, Any]:
    rows = _sample(device, case)
    result = report.record(case, rows)
    for row, record in zip(rows, result["rows"], strict=True):
        times = max(1, min(50, int(_BURST / max(row.median, 1e-6))))
        record["wall_ms"] = 1e3 * device.wall(row.contestant.call, times)
    return result


def _sample(device: Device, case: Case) -> list[Row]:
    """Interleaved samples; contestants that take long are asked less often."""
    rows = []
    for contestant in case.contestants:
        once = min(device.wall(contestant.call, 1) for _ in range(2))
        every = 1 if once < _SLOW else max(1, case.rounds // _FEW)
        rows.append(Row(contestant, burst=1, every=every))
    shuffle = random.Random(0).shuffle
    for index in range(case.rounds):
        taking_part = [row for row in rows if index % row.every == 0]
        shuffle(taking_part)
        for row in taking_part:
            row.samples.append(device.seconds(row.contestant.call))
            row.busy.append(False)
    assert all(statistics.median(row.samples) > 0 for row in rows)
    return rows
