"""Distances on a line, exactly: by quantiles, without regularisation."""

from typing import Any

import numpy as np

from fusedopt.ot._solve import given, namespace, solve


def wasserstein_1d(
    u_values: Any, v_values: Any, u_weights: Any = None, v_weights: Any = None, p: float = 1
) -> Any:
    """``W_p^p`` between two distributions on a line, as ``ot.wasserstein_1d``.

    Values and weights are vectors of NumPy or torch (with gradients); weights sum to the same,
    uniform by default; ``p`` at least 1.
    """
    numbers = namespace(u_values)
    if p < 1:
        raise ValueError(f"p is {p}, expected at least 1")
    if u_values.ndim != 1 or v_values.ndim != 1:
        raise ValueError("u_values and v_values: expected vectors")
    u, u_levels = _quantiles(u_values, u_weights, "u")
    v, v_levels = _quantiles(v_values, v_weights, "v")
    u_sum, v_sum = (levels.tolist()[-1] for levels in (u_levels, v_levels))
    if abs(u_sum - v_sum) > 1e-6 * u_sum:
        raise ValueError(f"u_weights sum to {u_sum:g} and v_weights to {v_sum:g}")
    levels = numbers.concatenate([u_levels, v_levels])
    levels = levels.sort().values if numbers is not np else np.sort(levels)
    steps = levels - numbers.concatenate([levels[:1] * 0, levels[:-1]])

    def at(values: Any, own: Any) -> Any:
        return values[numbers.clip(numbers.searchsorted(own, levels), 0, len(values) - 1)]

    return (steps * abs(at(u, u_levels) - at(v, v_levels)) ** p).sum()


def _quantiles(values: Any, weights: Any, name: str) -> tuple[Any, Any]:
    """Sorted values, and the mass up to each."""
    numbers = namespace(values)
    if weights is None:
        weights = numbers.ones_like(values) / len(values)
    if weights.shape != values.shape:
        shape, expected = tuple(weights.shape), tuple(values.shape)
        raise ValueError(f"{name}_weights have shape {shape}, expected {expected}")
    order = numbers.argsort(values)
    return values[order], weights[order].cumsum(0)


def wasserstein(a: Any, b: Any, M: Any = None, reg: Any = None, *, p: float = 1) -> Any:
    """The Wasserstein distance ``W_p`` between two histograms.

    Args:
        a, b: histograms of equal sums.
        M: ground distances to the power ``p`` between their bins; ``None``: bins lie at 0, 1, 2, …
            on a line, where the answer is exact.
        reg: for ``M``, as in ``solve``: the distance is that of the entropic plan.
        p: the distance is the ``1/p``-th power of the cost.
    """
    if M is None:
        if reg is not None:
            raise ValueError("reg needs M: on a line the distance is exact")
        numbers = namespace(a)
        first, second = (numbers.arange(len(x), dtype=x.dtype) for x in (a, b))
        return wasserstein_1d(first, second, a, b, p) ** (1 / p)
    return solve(M, given(a), given(b), reg).value_linear ** (1 / p)
