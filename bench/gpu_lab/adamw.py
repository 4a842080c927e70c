"""AdamW on a GPU against whatever peers are installed; the floor is a copy of the same bytes.

Every contestant is checked against float64 before it is timed. Times are medians between CUDA
events with cold L2, contestants interleaved; wall times are those of calls without a pause.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import peers
from bench.adamw import CASES, VARIANTS, Problem, Workload, built, functional, optimizer
from bench.gpu_lab.device import Device
from bench.harness import report
from bench.harness.timing import Case, Contestant, Row

_COPY = "copy"
_ROUNDS = 15
_SLOW = 0.02  # seconds; a slower contestant takes part in fewer rounds
_FEW = 3
_BURST = 0.05  # seconds of calls without a pause that a wall time is taken over
_PEERS = ("fusedopt", "torch")

# In the order of their importance: time may run out.
_CASES = {
    "64Mi": CASES["64Mi"],
    "5000x1000": CASES["5000x1000"],
    "gpt2": CASES["gpt2"],
    "odd": Workload("tensors of 2^24 - 37 elements", 4 * [((1 << 24) - 37,)], rounds=_ROUNDS),
    "unaligned": Workload(
        "the same, an element after an aligned address",
        4 * [((1 << 24) - 37,)],
        rounds=_ROUNDS,
        offset=1,
    ),
    "500x64": CASES["500x64"],
}
_GOALS = (  # case, variant, against whom, by which time, wanted
    ("64Mi", "bf16", _COPY, "median_ms", 0.92),
    ("64Mi", "fp32", _COPY, "median_ms", 0.95),
    ("64Mi", "bf16", "torch fused", "median_ms", 1.3),
    ("5000x1000", "fp32", "torch fused", "wall_ms", 10.0),
    ("5000x1000", "bf16", "torch fused", "wall_ms", 10.0),
    ("odd", "fp32", "torch fused", "median_ms", 1.3),
    ("odd", "bf16", "torch fused", "median_ms", 1.3),
    ("unaligned", "fp32", "torch fused", "median_ms", 1.3),
    ("unaligned", "bf16", "torch fused", "median_ms", 1.3),
)


class GpuCase(Case):
    """A case that has no threads to tell of."""

    @property
    def title(self) -> str:
        """What a person calls this case."""
        return f"{self.name} · {self.variant}"


def run(device: Device, out: Path, seconds: float | None) -> None:
    """Measure case after case, writing after each; begin none after so many seconds."""
    start, console = time.monotonic(), Console(width=160)
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, key in itertools.product(_CASES, VARIANTS):
        if seconds is not None and time.monotonic() - start > seconds:
            left_out.append(f"{name} {key}")
            continue
        results.append(_measure(device, name, key))
        report.print_case(console, results[-1])
        _write(out / "adamw.json", results, left_out)
    _write(out / "adamw.json", results, left_out)
    report.print_summary(console, results)
    if complaints := [complaint for result in results for complaint in _about_ours(result)]:
        raise SystemExit("\n".join(complaints))


def _about_ours(result: dict[str, Any]) -> list[str]:
    """Our own wrong answers, and what of ours did not run. A peer's are no failure of this step."""
    said = {row["name"]: f"wrong answers: {row['wrong']}" for row in result["rows"] if row["wrong"]}
    said |= {name: f"not run: {why}" for name, why in result["not_run"].items()}
    return [f"{result['title']}, {k}: {v}" for k, v in said.items() if k.startswith("fusedopt")]


def _write(path: Path, results: list[dict[str, Any]], left_out: list[str]) -> None:
    rates = [row["rate"] for r in results for row in r["rows"] if row["name"] == _COPY]
    record = {
        "copy_gb_per_s": max(rates, default=0.0),
        "goals": [_goal(results, *goal) for goal in _GOALS],
        "left_out": left_out,
        "cases": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def _goal(
    results: list[dict[str, Any]], case: str, variant: str, peer: str, time_key: str, wanted: float
) -> dict[str, Any]:
    value = None
    for result in results:
        if (result["case"], result["variant"]) == (case, VARIANTS[variant].title):
            times = {row["name"]: row[time_key] for row in result["rows"] if not row["wrong"]}
            if peer in times and "fusedopt" in times:
                value = times[peer] / times["fusedopt"]
    return {
        "what": f"{case} {variant}: time of {peer} over ours ({time_key.removesuffix('_ms')})",
        "wanted": wanted,
        "value": value,
        "reached": None if value is None else value >= wanted,
    }


# ---- one case


def _scaled(workload: Workload, scale: int) -> Workload:
    """The workload with fewer and smaller tensors."""
    if scale == 1:
        return workload
    shapes = workload.shapes[: max(4, len(workload.shapes) // 100)]
    small = [(max(1, torch.Size(shape).numel() // scale),) for shape in shapes]
    return replace(workload, shapes=small, rounds=2)


def _measure(device: Device, name: str, key: str) -> dict[str, Any]:
    workload = _scaled(_CASES[name], device.scale)
    problem = Problem(workload, VARIANTS[key], device.name)
    contestants, not_run = _contestants(device, problem)
    case = GpuCase(
        name=name,
        variant=VARIANTS[key].title,
        threads=1,
        contestants=contestants,
        not_run=not_run,
        rounds=min(workload.rounds, _ROUNDS),
        detail=workload.detail,
        work=problem.gigabytes,
        floor=_COPY,
    )
    rows = _sample(device, case)
    result = report.record(case, rows)
    for row, record in zip(rows, result["rows"], strict=True):
        times = max(1, min(50, int(_BURST / max(row.median, 1e-6))))
        record["wall_ms"] = 1e3 * device.wall(row.contestant.call, times)
    return result


def _contestants(device: Device, problem: Problem) -> tuple[list[Contestant], dict[str, str]]:
    found, missing = peers.find("adamw", _PEERS)
    more, absent = peers.find("adamw_gpu", None)
    builders: dict[str, Callable[[], Contestant]] = {
        _COPY: partial(_copy, problem),
        **{peer.name: partial(_peer, problem, peer) for peer in [*found, *more]},
    }
    for backend in device.backends:
        name = f"fusedopt.adamw_step, {backend}" if backend else "fusedopt.adamw_step"
        builders[name] = partial(functional, problem, backend)
    contestants, not_run = built(builders)
    left_out = {k: v for k, v in missing.items() if not v.startswith("left out")}
    return contestants, left_out | absent | not_run


def _peer(problem: Problem, peer: peers.OptimizerPeer) -> Contestant:
    contestant = optimizer(problem, peer)
    if contestant.wrong and peer.name not in _PEERS and not peer.name.startswith("torch"):
        contestant.note = "its states or its formula may be others"
    return contestant


def _copy(problem: Problem) -> Contestant:
    """Reads and writes as many bytes as the step, half of them each."""
    half = int(problem.gigabytes * 1e9) // 2
    source = torch.zeros(half, dtype=torch.uint8, device=problem.device)
    target = torch.empty_like(source)
    return Contestant(_COPY, lambda: target.copy_(source))


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
