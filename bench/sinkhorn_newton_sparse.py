"""Entropic optimal transport on the CPU: time until both marginals are within 1e-8 (L1).

Every answer is checked by the marginal error of the plan that comes back; who does not get there
is timed and not ranked. ``ot.emd`` solves the unregularised problem exactly and is timed beside.
Peers run on one thread; who takes longer than a second is sampled once. About ten minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fusedopt
from bench import peers
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant

TOLERANCE = 1e-8
ONCE = 1.0  # seconds; beyond it the call that checks the answer is the only sample
Problem = tuple[Any, Any, Any, float]  # cost, a, b, reg


def assignment(n: int, eta: float) -> Problem:
    """Costs uniform in [0, 1], uniform marginals: the paper's."""
    return np.random.default_rng(1).random((n, n)), np.full(n, 1 / n), np.full(n, 1 / n), 1 / eta


def images(power: str) -> Problem:
    """Two images of 28 x 28 with a few random strokes each; cost over its maximum."""
    rng = np.random.default_rng(1)
    points = np.stack(np.mgrid[0:28, 0:28], -1).reshape(-1, 2).astype(float)

    def strokes() -> Any:
        image, start = np.zeros(len(points)), rng.uniform(6, 22, 2)
        for _ in range(4):
            end = rng.uniform(4, 24, 2)
            for t in np.linspace(0, 1, 30):
                image += np.exp(-((points - start - t * (end - start)) ** 2).sum(1) / 1.5)
            start = end
        image = np.minimum(1.5 * image / image.max(), 1) + 0.01
        return image / image.sum()

    d = abs(points[:, None] - points)
    cost = {"l1": d.sum(-1), "l2": np.sqrt((d**2).sum(-1)), "sq": (d**2).sum(-1)}[power]
    return cost / cost.max(), strokes(), strokes(), 1 / 1200


def mixture(n: int, reg: float) -> Problem:
    """An exponential against two normal densities on a line, squared distances."""
    x = np.linspace(0, 5, n)
    a = np.exp(-x)
    b = np.exp(-0.5 * ((x - 1) / 0.2) ** 2) + 0.64 * np.exp(-0.5 * ((x - 3) / 0.5) ** 2) + 1e-12
    return (x[:, None] - x) ** 2 / 25, a / a.sum(), b / b.sum(), reg


def cloud(n: int, dimensions: int, eta: float) -> Problem:
    """Normal points, squared distances over their maximum."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(n, dimensions)), rng.normal(size=(n, dimensions)) + 0.5
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return cost / cost.max(), np.full(n, 1 / n), np.full(n, 1 / n), 1 / eta


def batch(count: int, n: int, eta: float) -> Problem:
    """Many small random problems."""
    marginals = np.full((count, n), 1 / n)
    return np.random.default_rng(1).random((count, n, n)), marginals, marginals, 1 / eta


@dataclass(frozen=True)
class Workload:
    """A problem, and what it is in words."""

    detail: str
    make: Callable[[], Problem]
    rounds: int = 5


CASES = {
    "lap500": Workload("random assignment, n = 500, eta = 1200", partial(assignment, 500, 1200)),
    "lap1000": Workload("random assignment, n = 1000, eta = 1200", partial(assignment, 1000, 1200)),
    "lap2000": Workload("random assignment, n = 2000, eta = 4800", partial(assignment, 2000, 4800)),
    "img-l1": Workload("28 x 28 images, L1, eta = 1200", partial(images, "l1")),
    "img-l2": Workload("28 x 28 images, L2, eta = 1200", partial(images, "l2")),
    "img-sq": Workload("28 x 28 images, squared L2, eta = 1200", partial(images, "sq")),
    "mixture": Workload("1-D mixture, n = 1000, reg = 1e-3", partial(mixture, 1000, 1e-3)),
    "cloud3": Workload("3-D clouds, n = 1000, eta = 1000", partial(cloud, 1000, 3, 1000)),
    "lap500-hard": Workload("random assignment, n = 500, eta = 1e4", partial(assignment, 500, 1e4)),
    "cloud3-hard": Workload("3-D clouds, n = 1000, eta = 5000", partial(cloud, 1000, 3, 5000)),
    "cloud30-hard": Workload("30-D clouds, n = 1000, eta = 5000", partial(cloud, 1000, 30, 5000)),
    "batch": Workload("1000 problems of 64 x 64, eta = 20", partial(batch, 1000, 64, 20)),
    "tiny": Workload("65536 problems of 4 x 4, eta = 5", partial(batch, 65536, 4, 5)),
}
VARIANTS = {"fp64": "fp64"}
QUICK = {"cases": ("lap500", "img-sq"), "dtypes": ("fp64",), "rounds": 3}
__all__ = ["CASES", "QUICK", "VARIANTS", "cases"]


def marginal_error(plan: Any, a: Any, b: Any) -> float:
    """The L1 error of both marginals; of a batch, the worst."""
    plan = np.asarray(plan)
    error = abs(plan.sum(-1) - a).sum(-1) + abs(plan.sum(-2) - b).sum(-1)
    return float(np.max(error))


def _complaint(plan: Any, problem: Problem) -> str:
    error = marginal_error(plan, problem[1], problem[2])
    return "" if error <= 1.1 * TOLERANCE else f"marginal error {error:.1e}"


def _ours(name: str, method: str, problem: Problem) -> Contestant:
    cost, a, b, reg = problem

    def call() -> Any:
        return fusedopt.sinkhorn_newton_sparse(
            cost, a, b, reg=reg, tol=TOLERANCE, method=method, max_iter=30000
        )

    result = call()
    note = f"{np.max(result.iterations)} iterations"
    return Contestant(name, call, note, _complaint(result.plan(), problem))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _peer(peer: Any, problem: Problem) -> Contestant:
    call = partial(peer.solve, *problem, TOLERANCE)
    plan, seconds = _timed(call)
    if peer.compiles:
        plan, seconds = _timed(call)
    note = ["exact, unregularised"] if peer.exact else []
    note += ["one sample"] if seconds > ONCE else []
    return Contestant(
        peer.name,
        call,
        ", ".join(note),
        _complaint(plan, problem),
        seconds if seconds > ONCE else None,
    )


def cases(options: Options) -> Iterator[Case]:
    """Every chosen problem and thread count."""
    wanted = None if options.peers is None else ("fusedopt", *options.peers)
    found, missing = peers.find("sinkhorn_newton_sparse", wanted)
    for name in options.cases:
        workload = CASES[name]
        problem = workload.make()
        batched = problem[0].ndim == 3
        fitting = [peer for peer in found if peer.batched == batched]
        for threads in options.threads:
            set_threads(threads)
            contestants = [
                _ours("fusedopt", "sns", problem),
                _ours("fusedopt sinkhorn", "sinkhorn", problem),
            ]
            not_run = dict(missing)
            if threads > 1:
                not_run |= {peer.name: "on one thread only" for peer in fitting}
            for peer in fitting if threads == 1 else ():
                try:
                    contestants.append(_peer(peer, problem))
                except Exception as error:  # peers fail in their own ways, each by its reason
                    not_run[peer.name] = (str(error) or repr(error)).splitlines()[0]
            yield Case(
                name=name,
                variant="fp64",
                threads=threads,
                contestants=contestants,
                not_run=not_run,
                rounds=options.rounds or workload.rounds,
                detail=workload.detail,
            )
