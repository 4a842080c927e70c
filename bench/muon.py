"""Muon on the CPU: one optimizer step as a user calls it, against torch's.

Hidden matrices go by Muon; where there are others, AdamW takes them, in ours within one optimizer,
in torch's by a second one, fused. Everything allocates its own state. All are checked against the
float64 reference by the relative error of the first step's update, with a bound by their precision:
ours computes in float32, torch's Newton–Schulz in bfloat16. The floor is the fewest operations that
any form of Newton–Schulz needs, symmetric products at half price, as multiply-adds in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import peers
from bench.blockwise_adam import CASES as BLOCKWISE
from bench.harness import floor
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant
from bench.newton_schulz import fewest_flops
from fusedopt import reference

Shape = tuple[int, ...]
HYPER: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


@dataclass(frozen=True)
class Workload:
    """Matrices for Muon, and what AdamW takes beside them."""

    detail: str
    matrices: tuple[Shape, ...]
    others: tuple[Shape, ...] = ()
    rounds: int = 11


@dataclass(frozen=True)
class Variant:
    """The parameters' dtype."""

    title: str
    dtype: torch.dtype


def _gpt2() -> Workload:
    shapes = [(name, shape) for name, shape, _ in BLOCKWISE["gpt2"].entries]
    hidden = [name.startswith("h.") and len(shape) == 2 for name, shape in shapes]
    matrices = tuple(shape for (_, shape), own in zip(shapes, hidden, strict=True) if own)
    others = tuple(shape for (_, shape), own in zip(shapes, hidden, strict=True) if not own)
    return Workload("GPT-2 small: 48 matrices, and 100 tensors for AdamW", matrices, others, 5)


_SMALL = ((16, 16), (32, 32), (64, 64), (64, 128), (128, 128), (128, 256))
CASES = {
    "512": Workload("one matrix of 512 x 512", ((512, 512),)),
    "1024": Workload("one matrix of 1024 x 1024", ((1024, 1024),)),
    "768x3072": Workload("one matrix of 768 x 3072", ((768, 3072),), rounds=7),
    "1024x4096": Workload("one matrix of 1024 x 4096", ((1024, 4096),), rounds=5),
    "12x768": Workload("twelve matrices of 768 x 768", ((768, 768),) * 12, rounds=5),
    "small": Workload("126 matrices, 16 x 16 to 128 x 256", _SMALL * 21),
    "gpt2": _gpt2(),
}
VARIANTS = {"fp32": Variant("fp32", torch.float32), "bf16": Variant("bf16", torch.bfloat16)}
QUICK = {"cases": ("512", "small"), "dtypes": ("fp32",), "rounds": 5, "peers": ("torch",)}
_BOUNDS = {"fp32": 1e-4, "bf16": 0.1}  # of relative errors of the products, by their precision
_CHECKED = 1 << 23  # elements: larger tensors are not compared with the reference


class Problem:
    """The tensors of one workload in one variant."""

    def __init__(self, workload: Workload, variant: Variant) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(shape: Shape, scale: float) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(scale).to(variant.dtype)

        shapes = [*workload.matrices, *workload.others]
        self.params = [Parameter(draw(shape, 0.02)) for shape in shapes]
        for param in self.params:
            param.grad = draw(tuple(param.shape), 0.1)
        self.start = [p.detach().clone() for p in self.params]
        self.matrices = self.params[: len(workload.matrices)]
        self.others = self.params[len(workload.matrices) :]
        first = {s: i for i, s in reversed(list(enumerate(workload.matrices)))}
        self.checked = [i for s, i in first.items() if self.params[i].numel() <= _CHECKED]
        self.exact = self._exact()

    def _exact(self) -> list[Tensor]:
        """The parameters of the first matrix of each shape after a step, in float64."""
        start = [self.start[i].double().numpy() for i in self.checked]
        grads: list[Any] = [self.params[i].grad for i in self.checked]
        result = reference.muon_step(
            start, [g.double().numpy() for g in grads], [0 * p for p in start], **HYPER
        )
        return [torch.from_numpy(p) for p in result.params]

    def contestant(self, name: str, build: Callable[..., Any], precision: str) -> Contestant:
        """One that takes steps from wherever it is, with its first step's error in the note."""
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.params], self.start)
        step = build(self.matrices, self.others, HYPER, ADAMW)
        step()
        error = max(map(self._error, self.checked, self.exact))
        wrong = "" if error <= _BOUNDS[precision] else f"relative error {error:.1e}"
        return Contestant(name, step, note=f"relative error {error:.1e}", wrong=wrong)

    def _error(self, index: int, exact: Tensor) -> float:
        start, got = self.start[index].double(), self.params[index].detach().double()
        rounding = (exact - exact.to(self.params[index].dtype).double()).norm()
        return float(((got - exact).norm() - rounding).clamp(min=0) / (start - exact).norm())


def _ours(
    matrices: list[Parameter], others: list[Parameter], hyper: dict[str, Any], adamw: dict[str, Any]
) -> Callable[[], object]:
    from fusedopt.optim import Muon

    groups: list[dict[str, Any]] = [{"params": matrices}]
    if others:
        groups.append({"params": others, "algorithm": "adamw"})
    return Muon(groups, **hyper, adamw=adamw).step


def _contestants(
    problem: Problem, flops: float, threads: int, found: list[Any]
) -> tuple[list[Contestant], dict[str, str]]:
    """All that can run here, and why the others can't."""
    builders: dict[str, Callable[[], Contestant]] = {
        "fusedopt": partial(problem.contestant, "fusedopt", _ours, "fp32"),
        **{p.name: partial(problem.contestant, p.name, p.build, p.precision) for p in found},
    }
    contestants = [Contestant(floor.NAME, floor.multiply_adds(flops, threads))]
    not_run = {}
    for name, build in builders.items():
        try:
            contestants.append(build())
        except Exception as error:  # peers fail in their own ways, each by its reason
            not_run[name] = (str(error) or repr(error)).splitlines()[0]
    return contestants, not_run


def cases(options: Options) -> Iterator[Case]:
    """Every chosen workload in every chosen variant and thread count, one in memory at a time."""
    wanted = None if options.peers is None else ("fusedopt", *options.peers)
    found, missing = peers.find("muon", wanted)
    for name, key in itertools.product(options.cases, options.dtypes):
        workload, variant = CASES[name], VARIANTS[key]
        problem = Problem(workload, variant)
        flops = sum(fewest_flops((1, rows, columns), True) for rows, columns in workload.matrices)
        for threads in options.threads:
            set_threads(threads)
            contestants, not_run = _contestants(problem, flops, threads, found)
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
