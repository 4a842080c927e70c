"""Newton–Schulz orthogonalization in float64 NumPy: what every backend is tested against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedopt import _newton_schulz_schedule as schedules

Array = NDArray[np.float64]

_TOP_EXPONENT = 14  # before rounding, the largest element is scaled to [2^14, 2^15)


def newton_schulz(
    G: ArrayLike,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Any] = "jordan",
    method: str = "auto",
    dtype: str = "float64",
    restarts: Sequence[int] | None = None,
) -> Array:
    """Orthogonalize matrices by Newton–Schulz iteration, as a pure function.

    Arguments as ``fusedopt.newton_schulz``, ``G`` as anything NumPy can convert. Each matrix is
    rounded to ``dtype`` (a name); everything else is float64, so this is the exact map of the
    rounded input. ``method`` makes no difference but float64's rounding.

    Source: Jordan 2024 (Muon); Amsel et al., arXiv:2505.16932; the Gram form: Dao-AILab 2026.
    """
    schedule = schedules.make(coefficients, steps, method, dtype, "float64", restarts)
    values = np.asarray(G).astype(np.float64)
    if values.ndim < 2:
        raise ValueError(f"G has shape {values.shape}, expected at least two dimensions")
    return run(values, schedule)


def run(values: Array, schedule: schedules.Schedule) -> Array:
    """Execute a schedule on a float64 array of at least two dimensions."""
    result = np.empty_like(values)
    for index in np.ndindex(values.shape[:-2]):
        result[index] = _one(values[index], schedule)
    return result


def _one(g: Array, schedule: schedules.Schedule) -> Array:
    if g.shape[0] > g.shape[1]:
        return _one(g.T, schedule).T
    largest = np.abs(g).max(initial=0)
    if largest == 0 or not np.isfinite(largest):
        return np.full(g.shape, 0.0 if largest == 0 else np.nan)
    x = _rounded(np.ldexp(g, _TOP_EXPONENT + 1 - np.frexp(largest)[1]), schedule.dtype)
    x /= np.linalg.norm(x)
    gram = g.shape[1] >= schedule.gram_from * g.shape[0]
    return _gram(x, schedule) if gram else _standard(x, schedule)


def _standard(x: Array, schedule: schedules.Schedule) -> Array:
    for a, b, c, _ in schedule.steps:
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    return x


def _gram(x: Array, schedule: schedules.Schedule) -> Array:
    identity = np.eye(len(x))
    r, q = x @ x.T, identity
    for a, b, c, restart in schedule.steps:
        if restart:
            x = q @ x
            r, q = x @ x.T, identity
        p = a * identity + b * r + c * r @ r
        q = q @ p
        r = p @ r @ p
    result: Array = q @ x
    return result


def _rounded(x: Array, dtype: str) -> Array:
    """To nearest even, from numbers below 2^15 in magnitude."""
    if dtype == "bfloat16":
        mantissa, exponent = np.frexp(x)
        x = np.ldexp(np.rint(mantissa * 256), exponent - 8)
    else:
        x = x.astype(dtype).astype(np.float64)
    return x
