"""Sinkhorn-Knopp with a fixed number of iterations on many small matrices."""

import sys
from typing import Any

import numpy as np

from fusedopt import _C, _arrays, backends
from fusedopt._threads import get_num_threads
from fusedopt.references import sinkhorn_knopp as reference
from fusedopt.steps._transport import check_device, describe, is_torch
from fusedopt.steps._transport_gpu import stream

DTYPES = frozenset({"float32", "float64"})
MOST_ROWS, MOST_ITERATIONS = 8, 100


def sinkhorn_knopp(logits: Any, *, iterations: int = 20, backend: str | None = None) -> Any:
    """Make ``exp(logits)`` doubly stochastic by a fixed number of iterations.

    Each scales the rows to sum 1, then the columns to ``n / m``: so the columns' sums are exact,
    the rows' nearly. It is the residual map of hyper-connections (20 iterations on 4 × 4 matrices,
    one per token); with other marginals, or to a tolerance, use ``sinkhorn_newton_sparse``.

    Args:
        logits: ``(..., n, m)``, n and m at most 8; float32 or float64 of torch or NumPy; copied
            where it is not contiguous, and not modified. A row may be shifted by any number. What
            lies below its row's largest by more than exp can hold (87 in float32) counts as zero,
            and a column of nothing else becomes NaN.
        iterations: 1 to 100.
        backend: ``"cpu"``, ``"cuda"``, ``"reference"``, or ``None``: by where the logits are; on a
            GPU they are a torch tensor, and the kernels work on transposed copies.

    Returns:
        An array like ``logits``. For torch it has gradients: exactly those of the iterations, which
        the backward pass repeats, so that nothing but the logits is kept.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend is not available here.

    Source: Sinkhorn and Knopp 1967; Xie et al., arXiv:2512.24880 (hyper-connections).
    """
    backends.device_type(logits, "logits")
    shape = tuple(int(size) for size in logits.shape)
    if backends.dtype_name(logits.dtype) not in DTYPES:
        raise TypeError(f"{describe('logits', logits)}: expected float32 or float64")
    if len(shape) < 2 or max(shape[-2:]) > MOST_ROWS:
        raise ValueError(
            f"{describe('logits', logits)}: expected (..., n, m) with n and m at most {MOST_ROWS}"
        )
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations is {iterations!r}, expected a whole number")
    if not 1 <= iterations <= MOST_ITERATIONS:
        raise ValueError(f"iterations is {iterations}, expected 1 to {MOST_ITERATIONS}")
    name = backends.choose(OPERATION, backend, [logits])
    check_device(logits, name, "logits")
    if name == "cuda" and not is_torch(logits):
        raise TypeError(f"{describe('logits', logits)}: on a GPU expected a tensor of torch")
    launch = OPERATION.launchers[name]
    if is_torch(logits) and logits.requires_grad:
        from fusedopt.steps._knopp_autograd import Knopp

        return Knopp.apply(logits, iterations, launch)
    return launch(logits, None, iterations)


def _launch_cpu(logits: Any, up: Any, iterations: int) -> Any:
    """The result; or, where ``up`` is its gradient, that of the logits."""
    if is_torch(logits):
        torch = sys.modules["torch"]
        given = [None if x is None else x.detach().contiguous() for x in (logits, up)]
        result = torch.empty_like(given[0])
    else:
        given = [None if x is None else np.ascontiguousarray(np.asarray(x)) for x in (logits, up)]
        result = np.empty_like(given[0])
    flat = (-1, *logits.shape[-2:]) if 0 not in logits.shape else (0, 1, 1)
    first, second, third = (None if x is None else x.reshape(flat) for x in (*given, result))
    _C.sinkhorn_knopp(first, second, third, iterations, get_num_threads())
    return result


def _launch_reference(logits: Any, up: Any, iterations: int) -> Any:
    values = _arrays.to_float64(logits)
    if up is None:
        result = reference.sinkhorn_knopp(values, iterations=iterations)
    else:
        result = reference.backward(values, _arrays.to_float64(up), iterations=iterations)
    if is_torch(logits):
        return sys.modules["torch"].from_numpy(result).to(logits.dtype)
    return result.astype(np.asarray(logits).dtype)


def _launch_cuda(logits: Any, up: Any, iterations: int) -> Any:
    """The kernels scale columns first and take minus the logits: they get the transposes."""
    torch = sys.modules["torch"]
    n, m = logits.shape[-2:]

    def turned(x: Any) -> Any:
        return x.detach().reshape(-1, n, m).mT.contiguous()

    cost = turned(-logits)
    result, like = torch.empty_like(cost), {"dtype": cost.dtype, "device": cost.device}
    if cost.numel():
        given = (cost, torch.full((m,), n / m, **like), torch.ones(n, **like), 1.0, iterations)
        if up is None:
            _C.tiny_plans(*given, result, stream(cost))
        else:
            single = cost.dtype == torch.float32
            size = _C.tiny_plans_workspace_bytes(len(cost), m, n, single, iterations)
            memory = torch.empty(size, dtype=torch.uint8, device=cost.device)
            _C.tiny_plans_backward(*given, turned(-up), result, memory.data_ptr(), stream(cost))
    return result.mT.contiguous().reshape(logits.shape)


LAUNCHERS = {"cpu": _launch_cpu, "cuda": _launch_cuda, "reference": _launch_reference}
OPERATION = backends.register(backends.Operation("sinkhorn_knopp", LAUNCHERS, DTYPES))
