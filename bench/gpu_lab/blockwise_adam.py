"""Blockwise Adam on a GPU, by Adam-mini's partitions, against torch's AdamW and Adam-mini."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import fusedopt
from bench import peers
from bench.adamw import HYPER, VARIANTS, built
from bench.blockwise_adam import CASES, Problem, Workload, optimizer, peer_optimizer
from bench.gpu_lab.device import Device
from bench.gpu_lab.measure import COPY, ROUNDS, Benchmark, GpuCase, copy_of
from bench.harness.timing import Contestant
from fusedopt.partitions import block_count

_CASES = ("64Mi-rows", "gpt2", "gpt2-conv1d", "5000x1000")
_PEERS = ("torch", "adam_mini")


def _scaled(workload: Workload, scale: int) -> Workload:
    """The workload with fewer tensors, each of fewer rows where its partition allows it."""
    if scale == 1:
        return workload
    small = [
        (name, (max(1, shape[0] // 1024), *shape[1:]) if kind == "row" else shape, kind)
        for name, shape, kind in workload.entries
        if kind in ("row", "tensor", "coordinate")
    ]
    return replace(workload, entries=small[:12], rounds=2)


def _build(device: Device, name: str, key: str) -> GpuCase:
    workload = _scaled(CASES[name], device.scale)
    problem = Problem(workload, VARIANTS[key], device.name)
    found, missing = peers.find("blockwise_adam", _PEERS)
    builders: dict[str, Callable[[], Contestant]] = {
        COPY: partial(copy_of, problem.gigabytes, device),
        "fusedopt": partial(optimizer, problem),
        **{peer.name: partial(peer_optimizer, problem, peer) for peer in found},
    }
    for backend in device.backends:
        step = "fusedopt.blockwise_adam_step"
        builders[f"{step}, {backend}" if backend else step] = partial(_functional, problem, backend)
    contestants, not_run = built(builders)
    left_out = {k: v for k, v in missing.items() if not v.startswith("left out")}
    return GpuCase(
        name=name,
        variant=VARIANTS[key].title,
        threads=1,
        contestants=contestants,
        not_run=left_out | not_run,
        rounds=min(workload.rounds, ROUNDS),
        detail=workload.detail,
        work=problem.gigabytes,
        floor=COPY,
    )


def _functional(problem: Problem, backend: str | None) -> Contestant:
    """``fusedopt.blockwise_adam_step`` on lists that the caller keeps."""
    moments = [torch.zeros_like(p, dtype=problem.variant.state) for p in problem.params]
    counts = [
        block_count(kind, p.shape) for kind, p in zip(problem.kinds, problem.params, strict=True)
    ]
    blocks = [torch.zeros(n, device=problem.device) for n in counts]
    numbers = itertools.count(1)

    def step() -> None:
        fusedopt.blockwise_adam_step(
            problem.params, problem.grads, moments, blocks,
            partitions=problem.kinds, step=next(numbers), backend=backend, **HYPER,
        )  # fmt: skip

    name = "fusedopt.blockwise_adam_step"
    return Contestant(
        f"{name}, {backend}" if backend else name, step, wrong=problem.complaint(step)
    )


BENCHMARK = Benchmark(
    cases=list(itertools.product(_CASES, ("fp32", "bf16"))),
    build=_build,
    goals=[],  # none is set for a GPU
)
