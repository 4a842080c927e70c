"""Entropic optimal transport in float64 NumPy: what every backend is tested against.

Dense throughout and without tricks: logarithms of sums, all entries of the plan, a direct solve.
``"sns-paper"`` follows Tang et al., arXiv:2401.12253, as it stands there.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PAPER_SINKHORN = 20  # iterations before the first Newton step
PAPER_ENTRIES = 5  # kept entries per row


class SinkhornResult(NamedTuple):
    """Potentials with ``⟨f, a⟩ = ⟨g, b⟩``, and what their plan is like.

    A line of the trace: reg, whether a Newton step, marginal error, entries, CG iterations, step.
    """

    f: Array
    g: Array
    cost: float
    value: float
    marginal_error: float
    iterations: int
    converged: bool
    trace: list[tuple[float, ...]]


def inspect(cost: Array, a: Array, b: Array) -> tuple[float, float, int, int, int, int]:
    """Least and largest finite cost, then where these are (or -1): a NaN, a ``-inf``, a row and a
    column that have mass but no finite cost opposite to mass.
    """

    def first(mask: NDArray[Any]) -> int:
        return int(np.argmax(mask)) if mask.any() else -1

    finite = np.isfinite(cost)
    return (
        float(np.min(cost, initial=np.inf, where=finite)),
        float(np.max(cost, initial=-np.inf, where=finite)),
        first(np.isnan(cost)),
        first(cost == -np.inf),
        first((a > 0) & ~(finite & (b > 0)).any(axis=1)),
        first((b > 0) & ~(finite & (a > 0)[:, None]).any(axis=0)),
    )


def sinkhorn_newton_sparse(
    cost: Array,
    a: Array,
    b: Array,
    *,
    reg: float,
    tol: float = 1e-8,
    max_iter: int = 2000,
    g: Array | None = None,
    method: str = "sns",
    sinkhorn_iterations: int = PAPER_SINKHORN,
    entries_per_row: float = PAPER_ENTRIES,
    watch: Callable[[tuple[float, ...]], bool] | None = None,
) -> SinkhornResult:
    """Solve ``min ⟨C, P⟩ + reg Σ P log P`` over plans with marginals ``a`` and ``b``.

    Arguments as ``fusedopt.sinkhorn_newton_sparse``, checked already; ``"sns-paper"`` alone has
    ``sinkhorn_iterations`` and ``entries_per_row``; ``watch`` sees each line of the trace, and says
    whether to stop.
    """
    problem = _Dense(cost, a, b)
    trace: list[tuple[float, ...]] = []
    start = np.zeros(len(problem.b)) if g is None else g[b > 0].astype(float)
    if method == "sns-paper":
        steps = _paper(problem, reg, sinkhorn_iterations, entries_per_row)
    elif method == "sinkhorn":
        steps = _sinkhorn(problem, reg, start)
    else:
        steps = _newton(problem, reg, start, tol, staged=g is None)
    best, least = (problem.row_potential(start, reg), start), np.inf
    for here, potentials, line in steps:
        error = problem.error(*potentials, here)
        trace.append((here, line[0], error, *line[1:]))
        if here == reg and error < least:
            best, least = potentials, error
        if (watch is not None and watch(trace[-1])) or len(trace) == max_iter or least <= tol:
            break
    return problem.result(*best, reg, tol, trace)


def adjoint(
    cost: Array, f: Array, g: Array, rows: Array, columns: Array, reg: float
) -> tuple[Array, Array]:
    """Solve ``r x + P y = rows``, ``Pᵀ x + c y = columns``, with P's sums r and c.

    The matrix has (1, −1) in its null space: the shortest solution.
    """
    with np.errstate(invalid="ignore"):
        plan = np.nan_to_num(np.exp((f[:, None] - cost + g) / reg))
    system = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    solution = np.linalg.lstsq(system, np.concatenate([rows, columns]), rcond=1e-14)[0]
    return solution[: len(f)], solution[len(f) :]


class _Dense:
    """A problem without its rows and columns of no mass."""

    def __init__(self, cost: Array, a: Array, b: Array) -> None:
        self.whole = (cost, a, b)
        self.cost, self.a, self.b = cost[np.ix_(a > 0, b > 0)], a[a > 0], b[b > 0]

    def plan(self, f: Array, g: Array, reg: float) -> Array:
        return np.exp((f[:, None] - self.cost + g) / reg)

    def error(self, f: Array, g: Array, reg: float) -> float:
        plan = self.plan(f, g, reg)
        return float(abs(plan.sum(1) - self.a).sum() + abs(plan.sum(0) - self.b).sum())

    def row_potential(self, g: Array, reg: float) -> Array:
        return reg * (np.log(self.a) - _log_sum((g - self.cost) / reg))

    def column_potential(self, f: Array, reg: float) -> Array:
        return reg * (np.log(self.b) - _log_sum((f - self.cost.T) / reg))

    def range(self) -> float:
        finite = self.cost[np.isfinite(self.cost)]
        return float(finite.max() - finite.min())

    def result(
        self, f: Array, g: Array, reg: float, tol: float, trace: list[tuple[float, ...]]
    ) -> SinkhornResult:
        shift = (g @ self.b - f @ self.a) / (2 * self.a.sum())
        f, g = f + shift, g - shift
        plan = self.plan(f, g, reg)
        error = self.error(f, g, reg)
        _cost, a, b = self.whole
        whole_f, whole_g = np.full(len(a), -np.inf), np.full(len(b), -np.inf)
        whole_f[a > 0], whole_g[b > 0] = f, g
        return SinkhornResult(
            whole_f,
            whole_g,
            float(np.multiply(plan, self.cost, where=plan > 0, out=np.zeros_like(plan)).sum()),
            float(f @ self.a + g @ self.b + reg * (self.a.sum() - plan.sum())),
            error,
            len(trace),
            error <= tol,
            trace,
        )


def _log_sum(rows: Array) -> Array:
    top = rows.max(axis=1)
    return np.asarray(top + np.log(np.exp(rows - top[:, None]).sum(axis=1)))


# What each yields: reg, potentials, (whether Newton, entries, CG iterations, step).
Steps = Iterator[tuple[float, tuple[Array, Array], tuple[float, ...]]]


def _sinkhorn(problem: _Dense, reg: float, g: Array) -> Steps:
    while True:
        g = problem.column_potential(problem.row_potential(g, reg), reg)
        yield reg, (problem.row_potential(g, reg), g), (0, 0, 0, 1)


def _newton(problem: _Dense, reg: float, g: Array, tol: float, staged: bool) -> Steps:
    """Newton on the function of g alone, with reg going down by fours."""
    stages = max(0, math.ceil(math.log(max(problem.range() / (20 * reg), 1), 4))) if staged else 0
    for stage in range(stages, -1, -1):
        here = reg * 4.0**stage
        target = 1e-2 * problem.a.sum() if stage else 0.0
        for _ in range(3 if staged else 0):
            f = problem.row_potential(g, here)
            g = problem.column_potential(f, here)
            yield here, (problem.row_potential(g, here), g), (0, 0, 0, 1)
        while True:
            f = problem.row_potential(g, here)
            if problem.error(f, g, here) <= target:
                break
            g, step = _newton_step(problem, g, here)
            yield here, (problem.row_potential(g, here), g), (1, problem.cost.size, 0, step)


def _newton_step(problem: _Dense, g: Array, reg: float) -> tuple[Array, float]:
    plan = problem.plan(problem.row_potential(g, reg), g, reg)
    gap = problem.b - plan.sum(0)
    hessian = np.diag(plan.sum(0)) - plan.T @ (plan / problem.a[:, None])
    shift = 1e-6 * np.linalg.norm(gap) + 1e-16
    direction = np.linalg.solve(hessian + shift * np.eye(len(g)), gap)

    def objective(at: Array) -> float:
        return float(-problem.row_potential(at, reg) @ problem.a - at @ problem.b)

    start, step = objective(g), 1.0
    noise = 1e-14 * (abs(start) + problem.range())
    while objective(g + step * reg * direction) > start + noise and step > 1e-6:
        step /= 2
    return g + step * reg * direction, step


def _paper(problem: _Dense, reg: float, sinkhorn: int, per_row: float) -> Steps:
    """Sinkhorn from zero, then Newton on f and g together with the largest entries of the plan."""
    f, g = np.zeros(len(problem.a)), np.zeros(len(problem.b))
    for _ in range(sinkhorn):
        f = problem.row_potential(g, reg)
        g = problem.column_potential(f, reg)
        yield reg, (f, g), (0, 0, 0, 1)
    count = min(math.ceil(per_row * len(problem.a)), problem.cost.size)
    while True:
        plan = problem.plan(f, g, reg)
        least = np.partition(plan, plan.size - count, axis=None)[plan.size - count]
        kept = np.where(plan >= least, plan, 0)
        gap = np.concatenate([problem.a - plan.sum(1), problem.b - plan.sum(0)])
        direction, used = _paper_direction(kept, plan.sum(1), plan.sum(0), gap)
        step = _paper_line_search(problem, f, g, reg, direction, float(gap @ direction))
        f = f + step * reg * direction[: len(f)]
        g = g + step * reg * direction[len(f) :]
        yield reg, (f, g), (1, count, used, step)


def _paper_direction(kept: Array, rows: Array, columns: Array, gap: Array) -> tuple[Array, int]:
    """Conjugate gradients, scaled by the diagonal, on ``[[diag(r), P], [Pᵀ, diag(c)]]``."""
    n, diagonal = len(rows), np.concatenate([rows, columns])
    where = np.nonzero(kept)
    entries = kept[where]

    def product(x: Array) -> Array:
        up = np.bincount(where[0], entries * x[n:][where[1]], n)
        down = np.bincount(where[1], entries * x[:n][where[0]], len(columns))
        return np.asarray(diagonal * x + np.concatenate([up, down]))

    x, residual = np.zeros(len(gap)), gap.copy()
    scaled = residual / diagonal
    direction, along = scaled, residual @ scaled
    target = 1e-6 * np.linalg.norm(gap)
    for used in range(2000):
        if np.linalg.norm(residual) <= target:
            return x, used
        image = product(direction)
        length = along / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        scaled = residual / diagonal
        following = residual @ scaled
        direction, along = scaled + following / along * direction, following
    return x, 2000


def _paper_line_search(
    problem: _Dense, f: Array, g: Array, reg: float, direction: Array, slope: float
) -> float:
    def objective(step: float) -> float:
        at_f, at_g = f + step * reg * direction[: len(f)], g + step * reg * direction[len(f) :]
        with np.errstate(over="ignore"):
            mass = problem.plan(at_f, at_g, reg).sum()
        return float(reg * mass - at_f @ problem.a - at_g @ problem.b)

    start, step = objective(0.0), 1.0
    while objective(step) > start - 1e-4 * step * reg * slope + 1e-15 * abs(start):
        step /= 2
        if step < 1e-6:
            break
    return step
