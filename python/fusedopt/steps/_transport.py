"""What optimal transport's operations share: the problem, checked, and the result."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedopt import _arrays, backends

DTYPES = frozenset({"float32", "float64"})
SMALLEST_REG = 1e-7  # of the largest finite cost; below, fp64 potentials can't hold the plan


class TraceStep(NamedTuple):
    """One iteration: what it was, and the marginal error after it."""

    stage: str
    reg: float
    marginal_error: float
    nnz: int
    cg_iterations: int
    step: float

    @classmethod
    def of(cls, line: Sequence[float]) -> "TraceStep":
        """From what kernels write: reg, whether a Newton step, error, entries, CG, step."""
        reg, newton, error, nnz, cg, step = line
        return cls("newton" if newton else "sinkhorn", reg, error, int(nnz), int(cg), step)


@dataclass(frozen=True)
class TransportResult:
    """A solution, or the best iterate where ``converged`` is false.

    For a batch every field has a leading dimension of problems, and ``result[i]`` is one of them.

    Attributes:
        f, g: potentials in float64, ``⟨f, a⟩ = ⟨g, b⟩``; ``-inf`` where the marginal is zero. torch
            tensors where the cost is one or the arguments ask for gradients, which they then give.
        cost: ``⟨C, P⟩`` of the plan.
        value: ``⟨C, P⟩ + reg Σ P log P``, evaluated as the dual, so accurate to the square of the
            marginal error. Where the arguments ask for gradients, a tensor that gives them.
        marginal_error: ``‖P1 − a‖₁ + ‖Pᵀ1 − b‖₁`` of the plan that ``f`` and ``g`` give.
        iterations: Sinkhorn and Newton iterations, each one pass over the cost.
        converged: whether ``marginal_error`` is at most ``tol``.
        reg: the regularisation of the problem.
    """

    f: Any
    g: Any
    cost: Any
    value: Any
    marginal_error: Any
    iterations: Any
    converged: Any
    reg: Any
    _cost_matrix: Any
    _trace: Any

    def plan(self) -> Any:
        """``P = exp((f_i + g_j − C_ij) / reg)``, in float64; with gradients where ``f`` has."""
        if is_torch(self.f):
            return _plan_of_tensors(self.f, self.g, self._cost_matrix, self.reg)
        reg = np.asarray(self.reg)[..., None, None]
        f, g = (_arrays.to_float64(x) for x in (self.f, self.g))
        plan = f[..., :, None] - _arrays.to_float64(self._cost_matrix)
        plan += g[..., None, :]
        plan /= reg
        np.exp(plan, out=plan)
        return like(self._cost_matrix, plan)

    @property
    def trace(self) -> list[Any]:
        """One ``TraceStep`` per iteration; a list of such lists for a batch.

        A batch keeps 16 MB of them (100 on a GPU): of many problems the first iterations, of very
        many none.
        """
        if np.ndim(self.iterations):
            return [self[i].trace for i in range(len(self.iterations))]
        return [TraceStep.of(line) for line in self._trace[: int(self.iterations)].tolist()]

    def __getitem__(self, index: int) -> "TransportResult":
        if not np.ndim(self.iterations):
            raise TypeError("the result of one problem has no index; a batch's has")
        return TransportResult(
            f=self.f[index],
            g=self.g[index],
            cost=float(self.cost[index]),
            value=self.value[index] if is_torch(self.value) else float(self.value[index]),
            marginal_error=float(self.marginal_error[index]),
            iterations=int(self.iterations[index]),
            converged=bool(self.converged[index]),
            reg=float(self.reg[index]),
            _cost_matrix=self._cost_matrix[index],
            _trace=self._trace[index],
        )


def _plan_of_tensors(f: Any, g: Any, cost: Any, reg: Any) -> Any:
    """The same, on the tensors' device."""
    plan = f[..., :, None] - cost.to(f.dtype)
    plan += g[..., None, :]
    plan /= sys.modules["torch"].as_tensor(reg, dtype=f.dtype, device=f.device)[..., None, None]
    return plan.exp_()


def is_torch(array: Any) -> bool:
    """Whether this is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def like(array: Any, values: Any) -> Any:
    """NumPy values as the kind of array that the caller uses; what is a tensor already stays."""
    if is_torch(array) and isinstance(values, np.ndarray):
        return sys.modules["torch"].from_numpy(values)
    return values


def check_device(array: Any, backend: str, name: str = "cost") -> None:
    """Whether the backend can read an array where it lies.

    Raises:
        ValueError: it can't.
    """
    on_gpu = backends.device_type(array, name) == "cuda"
    if backend != "reference" and on_gpu != (backend in backends.GPU):
        place = "a GPU" if on_gpu else "the CPU"
        raise ValueError(f"{name} is on {place}, but backend {backend!r} was asked for")


def describe(name: str, array: Any) -> str:
    """How messages call an argument."""
    return f"{name} (shape {tuple(array.shape)}, {array.dtype})"


@dataclass(frozen=True)
class Problem:
    """A batch of checked problems, in what kernels take."""

    cost: Any  # (B, n, m), its rows contiguous
    a: NDArray[Any]  # (B, n)
    b: NDArray[Any]  # (B, m), scaled to the sums of a
    reg: NDArray[Any]  # (B,)
    batched: bool  # as the caller sees it

    @property
    def shape(self) -> tuple[int, int, int]:
        problems, n, m = self.cost.shape
        return problems, n, m


def problem(cost: Any, a: Any, b: Any, reg: Any) -> Problem:
    """Check what can be checked without looking at the cost's values.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if backends.device_type(cost, "cost") != "cpu" and not is_torch(cost):
        kind = f"{type(cost).__module__}.{type(cost).__name__}"
        raise TypeError(f"cost is a {kind} on a GPU, expected a torch tensor there")
    if backends.dtype_name(cost.dtype) not in DTYPES:
        raise TypeError(f"{describe('cost', cost)}: expected float32 or float64")
    shape = tuple(int(size) for size in cost.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{describe('cost', cost)}: expected (n, m) or (problems, n, m)")
    if 0 in shape:
        raise ValueError(f"{describe('cost', cost)}: has no elements")
    batched = len(shape) == 3
    problems, n, m = shape if batched else (1, *shape)
    first = _marginal("a", a, problems, n, batched)
    second = _marginal("b", b, problems, m, batched)
    _balance(first, second, "float32" if is_single(cost, a, b) else "float64")
    return Problem(_rows(cost, batched), first, second, _regs(reg, problems, batched), batched)


def is_single(*arrays: Any) -> bool:
    """Whether any of the arrays is float32."""
    return any(x is not None and backends.dtype_name(x.dtype) == "float32" for x in arrays)


def _marginal(name: str, values: Any, problems: int, size: int, batched: bool) -> NDArray[Any]:
    if values is None:
        return np.full((problems, size), 1 / size)
    if not hasattr(values, "shape") or not hasattr(values, "dtype"):
        raise TypeError(f"{name} is {type(values).__name__}, expected an array")
    if backends.dtype_name(values.dtype) not in DTYPES:
        raise TypeError(f"{describe(name, values)}: expected float32 or float64")
    allowed = [(size,), (problems, size)] if batched else [(size,)]
    if tuple(values.shape) not in allowed:
        raise ValueError(f"{describe(name, values)}: expected shape {allowed[-1]}")
    array = np.array(np.broadcast_to(_arrays.to_float64(values), (problems, size)), order="C")
    for wrong, what in ((~np.isfinite(array), "is not finite"), (array < 0, "is negative")):
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])[0 if batched else 1 :]
            raise ValueError(f"{describe(name, values)}: {name}{list(index)} {what}")
    if not (array.sum(axis=1) > 0).all():
        raise ValueError(f"{describe(name, values)}: sums to zero")
    return array


def _balance(a: NDArray[Any], b: NDArray[Any], dtype: str) -> None:
    """Scale b to the sum of a, which rounding alone may keep apart."""
    sums_a, sums_b = a.sum(axis=1), b.sum(axis=1)
    allowed = 1e-10 if dtype == "float64" else 4e-7 * math.sqrt(a.shape[1] + b.shape[1])
    for i in np.flatnonzero(abs(sums_a - sums_b) > allowed * sums_a)[:1]:
        where = f" (problem {i})" if len(sums_a) > 1 else ""
        raise ValueError(
            f"a sums to {sums_a[i]:.17g} and b to {sums_b[i]:.17g}{where}: expected equal sums"
        )
    b *= (sums_a / sums_b)[:, None]


def _regs(reg: Any, problems: int, batched: bool) -> NDArray[Any]:
    values = _arrays.to_float64(reg) if hasattr(reg, "shape") else np.asarray(reg, dtype=float)
    if values.shape not in ((), (problems,)) or (values.shape and not batched):
        expected = f"a number or {problems} of them" if batched else "a number"
        raise ValueError(f"reg has shape {values.shape}, expected {expected}")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"reg is {reg}, expected a positive number")
    return np.array(np.broadcast_to(values, (problems,)), dtype=np.float64)


def _rows(cost: Any, batched: bool) -> Any:
    """As (B, n, m) with contiguous rows; anything laid out otherwise is copied."""
    if is_torch(cost):
        cost = cost.detach()
        cost = cost if cost.stride(-1) == 1 or cost.shape[-1] == 1 else cost.contiguous()
    else:
        cost = cost if isinstance(cost, np.ndarray) else np.from_dlpack(cost)
        if cost.strides[-1] != cost.itemsize or any(s % cost.itemsize for s in cost.strides):
            cost = np.ascontiguousarray(cost)
    return cost if batched else cost[None]


def check_cost(given: Problem, found: Any) -> NDArray[Any]:
    """The range of each problem's finite costs.

    ``found`` has a row for each: least and largest finite cost, then where these are (or -1): a
    NaN, a ``-inf``, a row and a column that have mass but no finite cost opposite to mass.

    Raises:
        ValueError: NaN, ``-inf``, a row or column without a way out, or a ``reg`` too small.
    """
    summaries = np.asarray(found, dtype=float)
    least, most = summaries[:, 0], summaries[:, 1]
    largest = np.maximum(abs(least), abs(most))
    bad = (summaries[:, 2:] >= 0).any(axis=1) | (given.reg < SMALLEST_REG * largest)
    for i in np.flatnonzero(bad)[:1]:
        _refuse_cost(given, int(i), *(int(x) for x in summaries[i, 2:]), largest=largest[i])
    return np.asarray(most - least)


def _refuse_cost(
    given: Problem, i: int, nan: int, minus_inf: int, row: int, column: int, *, largest: float
) -> None:
    name = f"cost[{i}]" if given.batched else "cost"
    for index, what in ((nan, "NaN"), (minus_inf, "-inf")):
        if index >= 0:
            raise ValueError(f"{name} has {what} at {divmod(index, given.shape[2])}")
    for index, marginal, what in ((row, "a", "row"), (column, "b", "column")):
        if index >= 0:
            raise ValueError(
                f"{name}: {what} {index} has mass ({marginal}[{index}] > 0), but every finite "
                "cost in it leads where there is none"
            )
    raise ValueError(
        f"reg is {given.reg[i]:g}, expected at least {SMALLEST_REG:g} of the largest cost "
        f"({largest:g}): below, float64 can't hold the plan"
    )
