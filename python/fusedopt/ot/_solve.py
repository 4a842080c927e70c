"""POT's ``solve``, ``sinkhorn`` and ``sinkhorn2`` on top of Sinkhorn-Newton-Sparse."""

import functools
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedopt import _arrays
from fusedopt.steps._transport import TransportResult, is_torch
from fusedopt.steps.sinkhorn_newton_sparse import sinkhorn_newton_sparse

REG_TYPES = ("KL", "entropy")
# POT's algorithms for the one problem that all of them solve.
_POT_METHODS = (
    *("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling", "greenkhorn"),
)


def namespace(array: Any) -> Any:
    """torch for its tensors, else NumPy."""
    return sys.modules["torch"] if is_torch(array) else np


def unif(n: int) -> NDArray[np.float64]:
    """``n`` equal weights that sum to 1."""
    return np.full(n, 1 / n)


class OTResult:
    """What POT's ``solve`` returns; for a batch every attribute has a leading dimension.

    Attributes:
        plan: the coupling, ``(n, m)``.
        potentials, potential_a, potential_b: as in POT in units of ``reg``:
            ``plan = exp(potential_a_i + potential_b_j − M_ij / reg)``.
        value_linear: ``⟨M, plan⟩``.
        value: ``value_linear + reg Σ P log(P / (a b))`` for ``reg_type="KL"``, without ``a b`` for
            ``"entropy"``; accurate to the square of the marginal error.
        marginals, marginal_a, marginal_b: the plan's sums.
        status: ``"converged"``, or what was reached.
        log: ``niter``, ``err`` and ``trace``.
        result: the ``TransportResult`` behind it, with potentials in units of the cost.
    """

    def __init__(self, result: TransportResult, M: Any, a: Any, b: Any, reg_type: str) -> None:
        self.result = result
        self._cost, self._a, self._b, self._reg_type = M, a, b, reg_type

    @functools.cached_property
    def plan(self) -> Any:
        return self.result.plan()

    @property
    def potential_a(self) -> Any:
        return self.result.f / self._reg_of(self.result.f)

    @property
    def potential_b(self) -> Any:
        return self.result.g / self._reg_of(self.result.g)

    @property
    def potentials(self) -> tuple[Any, Any]:
        return self.potential_a, self.potential_b

    @property
    def value_linear(self) -> Any:
        if not (is_torch(self.result.f) and self.result.f.requires_grad):
            return self.result.cost
        torch = sys.modules["torch"]
        cost = torch.as_tensor(self._cost)
        return (self.plan * torch.where(cost.isfinite(), cost, 0)).sum((-2, -1))

    @property
    def value(self) -> Any:
        value, reg = self.result.value, self.result.reg
        if self._reg_type == "entropy":
            return value
        return value - self._like_value(reg) * (self._entropy(self._a) + self._entropy(self._b))

    @property
    def marginal_a(self) -> Any:
        return self.plan.sum(-1)

    @property
    def marginal_b(self) -> Any:
        return self.plan.sum(-2)

    @property
    def marginals(self) -> tuple[Any, Any]:
        return self.marginal_a, self.marginal_b

    @property
    def status(self) -> str:
        if np.all(self.result.converged):
            return "converged"
        return f"not converged: marginal error {np.max(self.result.marginal_error):.1e}"

    @property
    def log(self) -> dict[str, Any]:
        result = self.result
        return {
            "niter": result.iterations,
            "err": result.marginal_error,
            "trace": result.trace,
        }

    def _reg_of(self, potential: Any) -> Any:
        reg = np.asarray(self.result.reg)[..., None]
        return sys.modules["torch"].from_numpy(reg) if is_torch(potential) else reg

    def _like_value(self, reg: Any) -> Any:
        if is_torch(self.result.value) and np.ndim(reg):
            return sys.modules["torch"].from_numpy(reg)
        return reg

    def _entropy(self, marginal: Any) -> Any:
        """``Σ x log x``, differentiable where the value is."""
        if is_torch(self.result.value):
            torch = sys.modules["torch"]
            x = torch.as_tensor(marginal).to(torch.float64)
            return torch.special.xlogy(x, x).sum(-1)
        x = _arrays.to_float64(marginal)
        return (x * np.log(x, where=x > 0, out=np.zeros_like(x))).sum(-1)


def solve(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: Any = None,
    *,
    reg_type: str = "KL",
    max_iter: int = 2000,
    tol: float = 1e-8,
    potentials_init: tuple[Any, Any] | None = None,
    method: str = "sns",
    backend: str | None = None,
) -> Any:
    """Solve ``min ⟨M, P⟩ + reg Σ P log(P / (a b))`` over plans with marginals ``a`` and ``b``.

    Args:
        M: costs, ``(n, m)``, ``(problems, n, m)``, or a list of matrices of any sizes.
        a, b: marginals of equal sums; ``None`` (or empty, as in POT): uniform.
        reg: positive; POT's ``None`` and 0 mean exact transport, which is refused.
        reg_type: ``"KL"``, or ``"entropy"`` for ``Σ P log P``: the same plan, another ``value``.
        max_iter, tol, method, backend: as in ``fusedopt.sinkhorn_newton_sparse``; ``tol`` is the
            L1 error of both marginals.
        potentials_init: an earlier result's ``potentials``.

    Returns:
        An ``OTResult``, or a list of them. Its values, potentials and plan have gradients where the
        arguments are torch tensors that require them.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if reg_type not in REG_TYPES:
        raise ValueError(f"reg_type is {reg_type!r}, expected one of {', '.join(REG_TYPES)}")
    if isinstance(M, list | tuple):
        if potentials_init is not None:
            raise ValueError("potentials_init: not for a list of problems")
        return [
            solve(
                *(each, pick("a", a, i), pick("b", b, i), pick("reg", reg, i)),
                reg_type=reg_type,
                max_iter=max_iter,
                tol=tol,
                method=method,
                backend=backend,
            )
            for i, each in enumerate(M)
        ]
    if reg is None or (np.ndim(reg) == 0 and float(reg) == 0):
        raise ValueError(
            f"reg is {reg}, which in POT asks for exact transport: give a positive reg "
            "(1e-4 of the largest cost comes close)"
        )
    a, b = given(a), given(b)
    start: dict[str, Any] = {}
    if potentials_init is not None:
        scale = _arrays.to_float64(reg)[..., None] if hasattr(reg, "shape") else reg
        f, g = (_arrays.to_float64(x) * scale for x in potentials_init)
        start = {"f": f, "g": g}
    result = sinkhorn_newton_sparse(
        M, a, b, reg=reg, tol=tol, max_iter=max_iter, method=method, backend=backend, **start
    )
    first, second = (
        unif(size) if marginal is None else marginal
        for marginal, size in zip((a, b), M.shape[-2:], strict=True)
    )
    return OTResult(result, M, first, second, reg_type)


def pick(name: str, argument: Any, i: int) -> Any:
    """What belongs to the i-th problem of a list."""
    if isinstance(argument, list | tuple):
        if i >= len(argument):
            raise ValueError(f"{name} has {len(argument)} entries, fewer than there are problems")
        return argument[i]
    return argument


def given(marginal: Any) -> Any:
    """POT calls a uniform marginal ``[]``."""
    return None if marginal is None or len(marginal) == 0 else marginal


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 2000,
    stopThr: float = 1e-9,
    *,
    log: bool = False,
    warn: bool = True,
) -> Any:
    """The plan between ``a`` and ``b``, as POT's ``ot.sinkhorn``.

    With ``b`` of shape ``(m, k)`` the ``k`` losses of ``a`` against its columns. ``method`` may be
    any of POT's names: all ask for the same answer, which comes by ``"sns"``. With ``log`` also a
    dictionary with ``u``, ``v``, ``err`` and ``niter``.
    """
    result = _sinkhorn(a, b, M, reg, method, numItermax, stopThr, warn)
    answer = result.value_linear if np.ndim(b) == 2 else result.plan
    return (answer, _log(result)) if log else answer


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 2000,
    stopThr: float = 1e-9,
    *,
    log: bool = False,
    warn: bool = False,
) -> Any:
    """``⟨M, P⟩`` of the plan between ``a`` and ``b``, or each column of ``b``: ``ot.sinkhorn2``."""
    result = _sinkhorn(a, b, M, reg, method, numItermax, stopThr, warn)
    return (result.value_linear, _log(result)) if log else result.value_linear


def _log(result: OTResult) -> dict[str, Any]:
    u, v = (namespace(x).exp(x) for x in result.potentials)
    return {"u": u, "v": v, **result.log}


def _sinkhorn(
    a: Any, b: Any, M: Any, reg: float, method: str, most: int, threshold: float, warn: bool
) -> OTResult:
    if method.lower() not in _POT_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(_POT_METHODS)}")
    if np.ndim(b) == 2:  # one cost for all columns, read where it lies
        M = namespace(M).broadcast_to(M, (b.shape[1], *M.shape))
        b = b.T
    result: OTResult = solve(M, a, b, reg, max_iter=most, tol=threshold)
    if warn and not np.all(result.result.converged):
        warnings.warn(f"sinkhorn: {result.status}", RuntimeWarning, stacklevel=3)
    return result
