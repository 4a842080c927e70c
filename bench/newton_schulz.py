"""Newton–Schulz on the CPU: five of Jordan's steps on float32 matrices, against torch's.

In the variant bf16 ours rounds its input to bfloat16, as an optimizer has it, and may take the Gram
form; torch's work in bfloat16 throughout. In fp32 nothing is rounded. Every contestant is in both,
checked against float64 with a bound by its own precision. The floor is the fewest operations that
any form needs, symmetric products at half price, as multiply-adds in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench import peers
from bench.harness import floor
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant
from fusedopt import reference

STEPS = 5
Shape = tuple[int, int, int]  # matrices, rows, columns


@dataclass(frozen=True)
class Workload:
    """Batches of matrices; each batch is one call."""

    detail: str
    batches: tuple[Shape, ...]
    rounds: int = 11


@dataclass(frozen=True)
class Variant:
    """What ours rounds its input to."""

    title: str
    dtype: torch.dtype


_SMALL = ((16, 16), (32, 32), (64, 64), (64, 128), (128, 128), (128, 256))
CASES = {
    "512": Workload("one matrix of 512 x 512", ((1, 512, 512),)),
    "1024": Workload("one matrix of 1024 x 1024", ((1, 1024, 1024),)),
    "768x3072": Workload("one matrix of 768 x 3072", ((1, 768, 3072),), 7),
    "1024x4096": Workload("one matrix of 1024 x 4096", ((1, 1024, 4096),), 5),
    "12x768": Workload("twelve matrices of 768 x 768", ((12, 768, 768),), 5),
    "small": Workload("126 matrices, 16 x 16 to 128 x 256", tuple((21, *s) for s in _SMALL)),
}
VARIANTS = {"bf16": Variant("bf16", torch.bfloat16), "fp32": Variant("fp32", torch.float32)}
QUICK = {"cases": ("512", "small"), "dtypes": ("bf16",), "rounds": 5, "peers": ("torch",)}
_BOUNDS = {"fp32": 2e-5, "bf16": 0.05}  # relative errors of random matrices, see newton_schulz.py


def fewest_flops(shape: Shape, gram: bool) -> float:
    """Of five steps with a quintic polynomial."""
    count, rows, columns = shape
    n, m = min(rows, columns), max(rows, columns)
    standard = STEPS * (3 * m * n**2 + n**3)
    return float(
        count * (min(standard, 3 * m * n**2 + (4 * STEPS - 3) * n**3) if gram else standard)
    )


class Problem:
    """The matrices of one workload, and what comes out in float64."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(s, generator=generator) for s in workload.batches]
        # One matrix of each shape is checked.
        self.exact = [
            torch.from_numpy(reference.newton_schulz(g[-1].numpy())) for g in self.batches
        ]

    def contestant(self, name: str, call: Callable[[Tensor], Tensor], precision: str) -> Contestant:
        """One that runs ``call`` on every batch, with its error in the note."""
        got = [call(g)[-1].double() for g in self.batches]
        error = max(float((x - y).norm() / y.norm()) for x, y in zip(got, self.exact, strict=True))
        wrong = "" if error <= _BOUNDS[precision] else f"relative error {error:.1e}"

        def run() -> None:
            for g in self.batches:
                call(g)

        return Contestant(name, run, note=f"relative error {error:.1e}", wrong=wrong)


def _contestants(
    problem: Problem, variant: Variant, flops: float, threads: int, found: list[Any]
) -> tuple[list[Contestant], dict[str, str]]:
    """All that can run here, and why the others can't."""

    def ours(g: Tensor) -> Tensor:
        result: Tensor = fusedopt.newton_schulz(g, dtype=variant.dtype)
        return result

    contestants = [
        Contestant(floor.NAME, floor.multiply_adds(flops, threads)),
        problem.contestant("fusedopt", ours, variant.title),
    ]
    not_run = {}
    for peer in found:
        try:
            contestants.append(problem.contestant(peer.name, peer.call, peer.precision))
        except Exception as error:  # peers fail in their own ways, each by its reason
            not_run[peer.name] = (str(error) or repr(error)).splitlines()[0]
    return contestants, not_run


@torch.no_grad()
def cases(options: Options) -> Iterator[Case]:
    """Every chosen workload in every chosen variant and thread count."""
    wanted = None if options.peers is None else ("fusedopt", *options.peers)
    found, missing = peers.find("newton_schulz", wanted)
    for name, key in itertools.product(options.cases, options.dtypes):
        workload, variant = CASES[name], VARIANTS[key]
        problem = Problem(workload)
        flops = sum(fewest_flops(s, variant.dtype == torch.bfloat16) for s in workload.batches)
        for threads in options.threads:
            set_threads(threads)
            contestants, not_run = _contestants(problem, variant, flops, threads, found)
            set_threads(threads)
            yield Case(
                name=name,
                variant=variant.title,
                threads=threads,
                contestants=contestants,
                not_run=missing | not_run,
                rounds=options.rounds or workload.rounds,
                detail=workload.detail,
                work=1e-9 * flops,
                unit="GFLOP/s",
                floor=floor.NAME,
            )
