"""Transport plans of very many tiny matrices by a fixed number of Sinkhorn iterations."""

import math
import sys
from typing import Any

import numpy as np

from fusedopt import _arrays, backends
from fusedopt.references import sinkhorn_newton_sparse as reference
from fusedopt.steps import _transport

LARGEST = 8  # rows and columns


def tiny_plans(
    cost: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    iterations: int = 20,
    backend: str | None = None,
) -> Any:
    """Plans ``diag(u) exp(-C/reg) diag(v)`` after some Sinkhorn iterations from ``u = 1``.

    Each iteration makes the columns exact, then the rows; nothing looks whether they agree by then.
    With ``cost=-logits``, marginals of ones and ``reg=1`` these are the doubly stochastic mixing
    matrices of hyper-connections. A float32 matrix of up to 4 x 4 is one thread's, others eight's.

    Args:
        cost: ``(..., n, m)`` with ``n`` and ``m`` at most 8; float32 or float64, in which all is
            computed. Costs of one matrix may differ by 80 ``reg`` (600 in float64), beside what
            whole rows and columns differ by; beyond, its plan may be NaN.
        a, b: marginals ``(n,)`` and ``(m,)`` for all matrices, not negative; uniform by default.
        reg: a positive number.
        iterations: at least 1.
        backend: ``"cuda"``, ``"reference"``, or ``None``: by where the cost is.

    Returns:
        The plans, of ``cost``'s shape and dtype. A torch tensor has gradients with respect to
        ``cost``, those of the iterations as they were done; it costs a second run of them.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend is not available here.
    """
    _check(cost, reg, iterations)
    name = backends.choose(OPERATION, backend, [cost])
    _transport.check_device(cost, name)
    n, m = (int(size) for size in cost.shape[-2:])
    masses = _masses("a", a, n, cost), _masses("b", b, m, cost)
    return OPERATION.launchers[name](cost, *masses, float(reg), iterations)


def _check(cost: Any, reg: float, iterations: int) -> None:
    if backends.device_type(cost, "cost") != "cpu" and not _transport.is_torch(cost):
        kind = f"{type(cost).__module__}.{type(cost).__name__}"
        raise TypeError(f"cost is a {kind} on a GPU, expected a torch tensor there")
    if backends.dtype_name(cost.dtype) not in _transport.DTYPES:
        raise TypeError(f"{_transport.describe('cost', cost)}: expected float32 or float64")
    if len(cost.shape) < 2 or not all(1 <= size <= LARGEST for size in cost.shape[-2:]):
        raise ValueError(
            f"{_transport.describe('cost', cost)}: expected (..., n, m) with n and m from 1 to 8"
        )
    if not (isinstance(reg, int | float) and 0 < reg < math.inf):
        raise ValueError(f"reg is {reg}, expected a positive number")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}, expected a whole number >= 1")


def _masses(name: str, values: Any, size: int, cost: Any) -> Any:
    """A marginal as an array of the cost's kind, or None."""
    if values is None:
        return None
    if tuple(getattr(values, "shape", ())) != (size,):
        shape = tuple(getattr(values, "shape", ()))
        raise ValueError(f"{name} has shape {shape}, expected {(size,)}")
    if getattr(values, "requires_grad", False):
        raise ValueError(f"{name} requires a gradient; only cost can have one")
    if not _transport.is_torch(cost):
        return _arrays.to_float64(values)
    torch = sys.modules["torch"]
    return torch.as_tensor(values, dtype=cost.dtype, device=cost.device).contiguous()


def _launch_cuda(cost: Any, a: Any, b: Any, reg: float, iterations: int) -> Any:
    from fusedopt.steps._transport_autograd import TinyPlans

    matrices = cost.reshape(-1, *cost.shape[-2:]).contiguous()
    return TinyPlans.apply(matrices, a, b, reg, iterations).reshape(cost.shape)


def _launch_reference(cost: Any, a: Any, b: Any, reg: float, iterations: int) -> Any:
    if getattr(cost, "requires_grad", False):
        raise ValueError("cost requires a gradient, which backend 'reference' does not give")
    masses = [None if x is None else _arrays.to_float64(x) for x in (a, b)]
    plans = reference.tiny_plans(_arrays.to_float64(cost), *masses, reg=reg, iterations=iterations)
    if _transport.is_torch(cost):
        return sys.modules["torch"].from_numpy(plans).to(cost)
    return plans.astype(np.dtype(cost.dtype))


OPERATION = backends.register(
    backends.Operation(
        "tiny_plans", {"cuda": _launch_cuda, "reference": _launch_reference}, _transport.DTYPES
    )
)
