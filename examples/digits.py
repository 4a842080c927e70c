"""Handwritten digits as histograms, and transport between them: what two examples share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedopt

Array = NDArray[np.float64]

SIDE = 8  # pixels
BACKGROUND = 1e-3  # of the brightest pixel: every pixel has some mass
REG = 5e-3  # of the largest cost
PAIRS = 100
TOLERANCE = 1e-8


@contextlib.contextmanager
def needs_scikit_learn() -> Iterator[None]:
    """Say plainly what is missing where an import fails."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"this needs {error.name}: pip install fusedopt[examples]  (scikit-learn's images)"
        ) from None


def load_digits() -> tuple[Array, NDArray[np.int64]]:
    """All images as rows that sum to 1, and their labels; needs scikit-learn."""
    with needs_scikit_learn():
        from sklearn.datasets import load_digits as load
    data = load()
    images = data.data / data.data.max() + BACKGROUND
    return images / images.sum(1, keepdims=True), data.target


def ground_cost() -> Array:
    """Squared distances between pixels, over the largest."""
    pixels = np.stack(np.mgrid[0:SIDE, 0:SIDE], -1).reshape(-1, 2).astype(float)
    cost = fusedopt.ot.dist(pixels)
    return cost / cost.max()


def solve_pairs(a: Array, b: Array, reg: float = REG) -> Any:
    """Transport from every row of ``a`` to the same row of ``b``: one cost, read where it lies."""
    cost = np.broadcast_to(ground_cost(), (len(a), SIDE**2, SIDE**2))
    return fusedopt.sinkhorn_newton_sparse(cost, a, b, reg=reg, tol=TOLERANCE)


@dataclass(frozen=True)
class Timing:
    """How long one solver took for all pairs, and the worst marginal error of its plans."""

    label: str
    seconds: float
    error: float


def time_pairs() -> list[Timing]:
    """Random pairs of digits by our solver and by POT's; without POT, by ours alone."""
    images, _ = load_digits()
    first, second = np.random.default_rng(0).choice(len(images), (2, PAIRS), replace=False)
    a, b = images[first], images[second]
    timings = [_timed("fusedopt", a, b, lambda: solve_pairs(a, b).plan())]
    with contextlib.suppress(ImportError):
        import ot

        cost = ground_cost()

        def pot() -> Array:
            options = {"stopThr": TOLERANCE / (2 * SIDE), "numItermax": 20000, "warn": False}
            return np.stack([ot.sinkhorn(*pair, cost, REG, **options) for pair in zip(a, b)])  # noqa: B905

        timings.append(_timed("POT, ot.sinkhorn", a, b, pot))
    return timings


def _timed(label: str, a: Array, b: Array, call: Callable[[], Array]) -> Timing:
    start = time.perf_counter()
    plans = call()
    seconds = time.perf_counter() - start
    errors = abs(plans.sum(2) - a).sum(1) + abs(plans.sum(1) - b).sum(1)
    return Timing(label, seconds, float(errors.max()))
