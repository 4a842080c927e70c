"""AdamW on a GPU against whatever peers are installed; checked against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench import peers
from bench.adamw import CASES, VARIANTS, Problem, Workload, built, functional, optimizer
from bench.gpu_lab.device import Device
from bench.gpu_lab.measure import COPY, ROUNDS, Benchmark, Goal, GpuCase, copy_of
from bench.harness.timing import Contestant

_PEERS = ("fusedopt", "torch")

# In the order of their importance: time may run out.
_CASES = {
    "64Mi": CASES["64Mi"],
    "5000x1000": CASES["5000x1000"],
    "gpt2": CASES["gpt2"],
    "odd": Workload("tensors of 2^24 - 37 elements", 4 * [((1 << 24) - 37,)], rounds=ROUNDS),
    "unaligned": Workload(
        "the same, an element after an aligned address",
        4 * [((1 << 24) - 37,)],
        rounds=ROUNDS,
        offset=1,
    ),
    "500x64": CASES["500x64"],
}
_GOALS = (  # case, variant, against whom, by which time, wanted
    ("64Mi", "bf16", COPY, "median_ms", 0.92),
    ("64Mi", "fp32", COPY, "median_ms", 0.95),
    ("64Mi", "bf16", "torch fused", "median_ms", 1.3),
    ("5000x1000", "fp32", "torch fused", "wall_ms", 10.0),
    ("5000x1000", "bf16", "torch fused", "wall_ms", 10.0),
    ("odd", "fp32", "torch fused", "median_ms", 1.3),
    ("odd", "bf16", "torch fused", "median_ms", 1.3),
    ("unaligned", "fp32", "torch fused", "median_ms", 1.3),
    ("unaligned", "bf16", "torch fused", "median_ms", 1.3),
)


def _scaled(workload: Workload, scale: int) -> Workload:
    """The workload with fewer and smaller tensors."""
    if scale == 1:
        return workload
    shapes = workload.shapes[: max(4, len(workload.shapes) // 100)]
    small = [(max(1, torch.Size(shape).numel() // scale),) for shape in shapes]
    return replace(workload, shapes=small, rounds=2)


def _build(device: Device, name: str, key: str) -> GpuCase:
    workload = _scaled(_CASES[name], device.scale)
    problem = Problem(workload, VARIANTS[key], device.name)
    contestants, not_run = _contestants(device, problem)
    return GpuCase(
        name=name,
        variant=VARIANTS[key].title,
        threads=1,
        contestants=contestants,
        not_run=not_run,
        rounds=min(workload.rounds, ROUNDS),
        detail=workload.detail,
        work=problem.gigabytes,
        floor=COPY,
    )


def _contestants(device: Device, problem: Problem) -> tuple[list[Contestant], dict[str, str]]:
    found, missing = peers.find("adamw", _PEERS)
    more, absent = peers.find("adamw_gpu", None)
    builders: dict[str, Callable[[], Contestant]] = {
        COPY: partial(copy_of, problem.gigabytes, device),
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


BENCHMARK = Benchmark(
    cases=list(itertools.product(_CASES, VARIANTS)),
    build=_build,
    goals=[Goal(case, VARIANTS[key].title, *rest) for case, key, *rest in _GOALS],
)
