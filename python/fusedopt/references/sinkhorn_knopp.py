"""Sinkhorn-Knopp in float64 NumPy, in logarithms, and its derivative one iteration at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _log_sum(x: Array, axis: int) -> Array:
    top = x.max(axis=axis, keepdims=True)
    return np.asarray(top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True)))


def _halves(logits: Any, iterations: int) -> list[tuple[int, Array]]:
    """After each half: which axis was scaled, and the logarithm of the matrices."""
    x = np.asarray(logits, dtype=np.float64)
    n, m = x.shape[-2:]
    halves = []
    for _ in range(iterations):
        x = x - _log_sum(x, -1)
        halves.append((-1, x))
        x = x - _log_sum(x, -2) + np.log(n / m)
        halves.append((-2, x))
    return halves


def sinkhorn_knopp(logits: Any, *, iterations: int = 20) -> Array:
    """Scale the rows of ``exp(logits)`` to sum 1, then its columns to ``n / m``, and again."""
    return np.exp(_halves(logits, iterations)[-1][1])


def backward(logits: Any, up: Any, *, iterations: int = 20) -> Array:
    """The gradient with respect to the logits, for that with respect to the result."""
    halves = _halves(logits, iterations)
    grad = np.asarray(up, dtype=np.float64) * np.exp(halves[-1][1])
    for axis, x in reversed(halves):
        scaled = np.exp(x)
        share = scaled / scaled.sum(axis=axis, keepdims=True)
        grad = grad - share * grad.sum(axis=axis, keepdims=True)
    return grad
