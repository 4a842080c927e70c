"""Muon's step on a GPU, as called and replayed from a graph, against torch's.

The floor is a copy of the bytes that a step has to move beside its products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

import fusedopt
from bench.adamw import built
from bench.gpu_lab.device import Device
from bench.gpu_lab.measure import COPY, ROUNDS, Benchmark, Goal, GpuCase, copy_of
from bench.harness.timing import Contestant

_SMALL = ((16, 16), (32, 32), (64, 64), (64, 128), (128, 128), (128, 256))
_CASES: dict[str, list[tuple[int, int]]] = {
    "126 small": 21 * list(_SMALL),
    "12x768": 12 * [(768, 768)],
    "gpt2 matrices": 12 * [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HYPER: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
_BOUND = 0.06  # of the first update's relative error: both compute in half precision


class _Problem:
    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: Device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.device = device
        # small, so that bfloat16 parameters can tell their update
        self.start = [(0.02 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]
        self.grads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        elements = sum(x.numel() for x in self.start)
        # before: g, m, and m again; after: p twice; u and o once each way, in float32
        self.gigabytes = 1e-9 * elements * (5 * self.start[0].element_size() + 4 * 4)
        self.exact = [x.float().clone() for x in self.start]
        zeros = [torch.zeros_like(x) for x in self.exact]
        grads = [g.float() for g in self.grads]
        fusedopt.muon_step(self.exact, grads, zeros, ns_dtype="float32", **_HYPER)

    def params(self) -> list[Parameter]:
        """Fresh ones on the device, with gradients."""
        params = [Parameter(x.to(self.device.name, copy=True)) for x in self.start]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g.to(self.device.name)
        return params

    def contestant(self, name: str, make: Callable[[list[Parameter]], Any]) -> Contestant:
        """An optimizer, checked by its first step."""
        params = self.params()
        optimizer = make(params)
        optimizer.step()
        pairs = zip(params, self.exact, self.start, strict=True)
        errors = [
            float((p.detach().cpu().float() - x).norm() / (x - s.float()).norm())
            for p, x, s in pairs
        ]
        wrong = "" if max(errors) <= _BOUND else f"relative error {max(errors):.1e}"
        return Contestant(name, optimizer.step, f"relative error {max(errors):.1e}", wrong)

    def replayed(self, name: str) -> Contestant:
        """Ours, captured; its values are checked by the lab's step ``graph``."""
        optimizer = fusedopt.optim.Muon(self.params(), capturable=True, **_HYPER)
        with self.device.side_stream():
            optimizer.step()
        self.device.synchronize()
        return Contestant(name, self.device.capture(optimizer.step))


def _build(device: Device, name: str, key: str) -> GpuCase:
    shapes = _CASES[name] if device.scale == 1 else [(16, 24), (8, 8)]
    problem = _Problem(shapes, _DTYPES[key], device)
    builders: dict[str, Callable[[], Contestant]] = {
        COPY: partial(copy_of, problem.gigabytes, device),
        "fusedopt": partial(
            problem.contestant, "fusedopt", lambda p: fusedopt.optim.Muon(p, **_HYPER)
        ),
        "fusedopt, graph": partial(problem.replayed, "fusedopt, graph"),
        "torch Muon": partial(
            problem.contestant, "torch Muon", lambda p: torch.optim.Muon(p, **_HYPER)
        ),
    }
    contestants, not_run = built(builders)
    return GpuCase(
        name=name,
        variant=key,
        threads=1,
        contestants=contestants,
        not_run=not_run,
        rounds=ROUNDS,
        detail=f"{len(shapes)} matrices",
        work=problem.gigabytes,
        floor=COPY,
    )


BENCHMARK = Benchmark(
    cases=list(itertools.product(_CASES, _DTYPES)),
    build=_build,
    goals=[Goal("126 small", "fp32", "torch Muon", "wall_ms", 5.0, "fusedopt, graph")],
)
