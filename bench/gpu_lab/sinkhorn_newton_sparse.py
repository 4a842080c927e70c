"""Entropic optimal transport on a GPU: time until both marginals are within 1e-8 (1e-6 in float32).

The floor is one copy of the cost, whose bytes every iteration reads once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fusedopt
from bench.adamw import built
from bench.gpu_lab.device import Device
from bench.gpu_lab.measure import COPY, Benchmark, GpuCase, copy_of
from bench.harness.timing import Contestant
from bench.sinkhorn_newton_sparse import Problem, assignment, batch

_ROUNDS = 5
_CASES: dict[str, Callable[[int], Problem]] = {  # by how much smaller than on a GPU
    "lap2000": lambda scale: assignment(2000 // scale, 4800 / scale),
    "lap5000": lambda scale: assignment(5000 // scale, 12000 / scale),
    "1000x64x64": lambda scale: batch(1000 // scale, 64 // min(scale, 8), 20),
    "65536x4x4": lambda scale: batch(65536 // scale, 4, 5),
}
_DTYPES = {"fp64": (torch.float64, 1e-8), "fp32": (torch.float32, 1e-6)}


def _ours(
    cost: torch.Tensor, reg: float, tolerance: float, name: str, backend: str | None
) -> Contestant:
    def call() -> Any:
        return fusedopt.sinkhorn_newton_sparse(cost, reg=reg, tol=tolerance, backend=backend)

    plan = call().plan()
    rows, columns = plan.sum(-1) - 1 / plan.shape[-2], plan.sum(-2) - 1 / plan.shape[-1]
    error = float((rows.abs().sum(-1) + columns.abs().sum(-1)).max())
    wrong = "" if error <= 2 * tolerance else f"marginal error {error:.1e}"
    return Contestant(name, call, f"marginal error {error:.1e}", wrong)


def _build(device: Device, name: str, key: str) -> GpuCase:
    dtype, tolerance = _DTYPES[key]
    matrix, _, _, reg = _CASES[name](1 if device.scale == 1 else 64)
    cost = torch.from_numpy(matrix).to(device.name, dtype)
    gigabytes = 2e-9 * cost.numel() * cost.element_size()
    builders: dict[str, Callable[[], Contestant]] = {
        COPY: partial(copy_of, gigabytes, device),
        "fusedopt": partial(_ours, cost, reg, tolerance, "fusedopt", None),
    }
    for backend in device.backends:
        if fusedopt.supports("sinkhorn_newton_sparse", backend, device=device.name)[0]:
            title = ", ".join(filter(None, ("fusedopt.sinkhorn_newton_sparse", backend)))
            builders[title] = partial(_ours, cost, reg, tolerance, title, backend)
    contestants, not_run = built(builders)
    return GpuCase(
        name=name,
        variant=key,
        threads=1,
        contestants=contestants,
        not_run=not_run,
        rounds=_ROUNDS,
        detail="x".join(map(str, cost.shape)),
        work=gigabytes,
        floor=COPY,
    )


BENCHMARK = Benchmark(
    cases=list(itertools.product(_CASES, _DTYPES)),
    build=_build,
    goals=[],  # they are times of one device, not ratios
)
