"""Entropic optimal transport by Sinkhorn-Newton-Sparse."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedopt import _C, _arrays, backends
from fusedopt._threads import get_num_threads
from fusedopt.references import sinkhorn_newton_sparse as reference
from fusedopt.steps import _transport, _transport_gpu
from fusedopt.steps._transport import Problem, TransportResult
from fusedopt.steps._transport_watch import Watch

METHODS = ("sns", "sinkhorn", "sns-paper")


def sinkhorn_newton_sparse(
    cost: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: Any,
    tol: float = 1e-8,
    max_iter: int = 2000,
    f: Any = None,
    g: Any = None,
    method: str = "sns",
    backend: str | None = None,
    callback: Callable[..., Any] | None = None,
    progress: bool = False,
    low_memory: bool = False,
) -> Any:
    """Solve entropic optimal transport.

    Minimises ``⟨C, P⟩ + reg Σ P log P`` over plans with ``P1 = a``, ``Pᵀ1 = b``; the solution is
    ``P = exp((f_i + g_j − C_ij) / reg)``.

    Args:
        cost: ``(n, m)``, or ``(problems, n, m)`` for a batch, or a list of matrices of any sizes
            (the result is a list); float32 or float64 of torch, NumPy or any DLPack library. Only
            read; copied where its rows are not contiguous. ``inf`` forbids a pair. Arithmetic is in
            float64 for both dtypes.
        a, b: marginals ``(n,)`` and ``(m,)``, or one per problem; uniform by default. Not negative,
            of equal sums (``b`` is scaled by what rounding left). A zero empties its row or column
            and makes its potential ``-inf``.
        reg: positive, at least 1e-7 of the largest finite cost; one for all or one per problem.
        tol: on the L1 error of both marginals.
        max_iter: of Sinkhorn and Newton iterations together. What is not solved then is returned
            as it is best, with ``converged`` false.
        f, g: potentials to start from, such as an earlier result's; ``g`` is enough.
        method: ``"sns"``: reg goes down in stages, each of a few Sinkhorn iterations and Newton
            steps on the plan's larger entries. ``"sinkhorn"``: over-relaxed Sinkhorn.
            ``"sns-paper"``: the paper's own schedule, on the reference backend only.
        backend: ``"cpu"``, ``"cuda"``, ``"reference"``, or ``None``: by where the cost is. On a GPU
            the cost is a torch tensor; the solve is one launch, after which its outcome is read.
        callback: called after every iteration with its ``TraceStep``, for a batch or list also with
            the problem's index; the problem ends there if it returns something true. Of a batch on
            several threads, problems take turns. What it raises ends everything. On the CPU only.
        progress: show a progress bar of iterations (``tqdm``); on the CPU only.
        low_memory: work with at most one array of the cost's size (in float64) beside the cost,
            without it at most two; Newton's system then holds at most half of the plan. What does
            not grow with ``n m`` comes on top: about 1 kB a row and column. On the CPU only.

    Returns:
        A ``TransportResult``. With respect to those of ``cost``, ``a`` and ``b`` that are torch
        tensors which require them, its ``value`` has gradients by the envelope theorem (``P``,
        ``f + reg/2``, ``g + reg/2``), and ``f``, ``g`` and ``plan()`` by implicit differentiation:
        one linear system, solved like those of Newton's steps. A problem of a batch gets the bits
        it would get alone.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend is not available here.
        ImportError: ``progress`` without tqdm.

    Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, arXiv:2401.12253.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    _check_limits(tol, max_iter)
    options: dict[str, Any] = {
        "tol": tol,
        "max_iter": max_iter,
        "method": method,
        "low_memory": low_memory,
    }
    with Watch(callback, progress) as watch:
        if isinstance(cost, list | tuple):
            return _solve_list(cost, a, b, reg, f, g, backend, watch, options)
        return _solve(cost, a, b, reg, f, g, backend, watch, **options)


def _solve(
    cost: Any,
    a: Any,
    b: Any,
    reg: Any,
    f: Any,
    g: Any,
    backend: str | None,
    watch: Watch,
    *,
    tol: float,
    max_iter: int,
    method: str,
    low_memory: bool,
    index: int | None = None,
) -> TransportResult:
    """One matrix or one batch; ``index``: where it stands in a list."""
    given = _transport.problem(cost, a, b, reg)
    name = backends.choose(OPERATION, backend, [cost])
    _transport.check_device(cost, name)
    if method == "sns-paper" and name != "reference":
        raise ValueError(f"method 'sns-paper' runs on backend 'reference' only, not on {name!r}")
    extra: dict[str, Any] = {}
    if watch.wanted:
        extra["watch"] = watch.of(index, given.batched)
    if low_memory and name != "reference":  # the reference is dense throughout
        extra["low_memory"] = True
    if extra and name not in ("cpu", "reference"):
        raise ValueError(f"callback, progress and low_memory: not on backend {name!r}")
    solved = OPERATION.launchers[name](given, _start(given, f, g), tol, max_iter, method, **extra)
    return _result(cost, a, b, given, solved, name)


def sinkhorn_step(
    cost: Any, a: Any = None, b: Any = None, *, reg: Any, g: Any = None, backend: str | None = None
) -> TransportResult:
    """One Sinkhorn iteration from ``g`` (zeros by default): ``f``, then ``g``, then the new ``f``.

    Arguments and result as in ``sinkhorn_newton_sparse``.
    """
    return _step(SINKHORN_STEP, "sinkhorn", cost, a, b, reg, g, backend)


def sns_newton_step(
    cost: Any, a: Any = None, b: Any = None, *, reg: Any, g: Any = None, backend: str | None = None
) -> TransportResult:
    """One sparse Newton step with line search from ``g`` (zeros by default).

    Arguments and result as in ``sinkhorn_newton_sparse``.
    """
    return _step(SNS_NEWTON_STEP, "sns", cost, a, b, reg, g, backend)


def _step(
    operation: backends.Operation,
    method: str,
    cost: Any,
    a: Any,
    b: Any,
    reg: Any,
    g: Any,
    backend: str | None,
) -> TransportResult:
    given = _transport.problem(cost, a, b, reg)
    name = backends.choose(operation, backend, [cost])
    _transport.check_device(cost, name)
    start = _start(given, None, g)
    if start is None:
        start = np.where(given.b > 0, 0.0, -np.inf)
    solved = operation.launchers[name](given, start, 0.0, 1, method)
    return _result(cost, a, b, given, solved, name)


def _check_limits(tol: float, max_iter: int) -> None:
    if not tol > 0:
        raise ValueError(f"tol is {tol}, expected a positive number")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter is {max_iter!r}, expected a whole number >= 1")


def _solve_list(
    costs: Any,
    a: Any,
    b: Any,
    reg: Any,
    f: Any,
    g: Any,
    backend: str | None,
    watch: Watch,
    options: dict[str, Any],
) -> list[TransportResult]:
    def of(name: str, argument: Any, i: int) -> Any:
        if not isinstance(argument, list | tuple):
            if argument is None or name == "reg":
                return argument
            raise TypeError(f"{name} is {type(argument).__name__}, expected a list as cost is one")
        if len(argument) != len(costs):
            raise ValueError(f"{name} has {len(argument)} entries, cost has {len(costs)}")
        return argument[i]

    return [
        _solve(
            cost,
            of("a", a, i),
            of("b", b, i),
            of("reg", reg, i),
            of("f", f, i),
            of("g", g, i),
            backend,
            watch,
            **options,
            index=i,
        )
        for i, cost in enumerate(costs)
    ]


def _start(given: Problem, f: Any, g: Any) -> NDArray[Any] | None:
    """The potentials g to start from, if any."""
    problems, n, m = given.shape
    start = _potential("g", g, (problems, m), given.b, given.batched)
    from_f = _potential("f", f, (problems, n), given.a, given.batched)
    if start is None and from_f is not None:  # what each column would pay at most
        start = (_arrays.to_float64(given.cost) - from_f[:, :, None]).min(axis=1)
        start[given.b == 0] = -np.inf
    return start


def _potential(
    name: str, values: Any, shape: tuple[int, int], marginal: NDArray[Any], batched: bool
) -> NDArray[Any] | None:
    if values is None:
        return None
    expected = shape if batched else shape[1:]
    if tuple(getattr(values, "shape", ())) != expected:
        raise ValueError(
            f"{name} has shape {tuple(getattr(values, 'shape', ()))}, expected {expected}"
        )
    array = np.array(_arrays.to_float64(values), order="C").reshape(shape)
    array[marginal == 0] = -np.inf
    if not np.isfinite(array[marginal > 0]).all():
        raise ValueError(f"{_transport.describe(name, values)}: not finite where there is mass")
    return array


# f, g, facts, trace; tensors where the cost is on a GPU
Solved = tuple[Any, Any, NDArray[Any], Any]


_TRACE_BYTES = 1 << 24  # of a batch; beyond it traces end early


def _trace_room(problems: int, max_iter: int) -> int:
    """How many iterations of each problem are kept: all, or as many as there is memory for."""
    room = _TRACE_BYTES // (48 * problems)
    return min(max_iter, room) if room >= 16 else 0


def _workspace(problems: int, n: int, m: int, low_memory: bool) -> tuple[NDArray[Any], int, int]:
    """Memory for the kernels, and how many problems and threads work side by side in it."""
    threads = get_num_threads()
    lanes = min(problems, threads)
    size = lanes * _C.transport_workspace_bytes(n, m, low_memory) + 64
    return np.empty(size, np.uint8), lanes, threads


def _launch_cpu(
    given: Problem,
    start: NDArray[Any] | None,
    tol: float,
    max_iter: int,
    method: str,
    *,
    low_memory: bool = False,
    watch: Callable[..., bool] | None = None,
) -> Solved:
    problems, n, m = given.shape
    summaries = np.empty((problems, 6))
    _C.transport_inspect(given.cost, given.a, given.b, summaries, get_num_threads())
    ranges = _transport.check_cost(given, summaries)
    f = np.empty((problems, n))
    g = np.empty((problems, m)) if start is None else start
    facts = np.empty((problems, 6))
    trace = np.empty((problems, _trace_room(problems, max_iter), 6))
    workspace, lanes, threads = _workspace(problems, n, m, low_memory)
    _C.transport_solve(
        given.cost,
        given.a,
        given.b,
        given.reg,
        ranges,
        f,
        g,
        trace,
        facts,
        tol,
        max_iter,
        method == "sinkhorn",
        start is not None,
        tol == 0,
        low_memory,
        watch,
        workspace,
        lanes,
        threads,
    )
    return f, g, facts, trace


def _launch_reference(
    given: Problem,
    start: NDArray[Any] | None,
    tol: float,
    max_iter: int,
    method: str,
    *,
    watch: Callable[..., bool] | None = None,
) -> Solved:
    cost = _arrays.to_float64(given.cost)
    _transport.check_cost(
        given, [reference.inspect(*each) for each in zip(cost, given.a, given.b, strict=True)]
    )
    solved = [
        reference.sinkhorn_newton_sparse(
            cost[i],
            given.a[i],
            given.b[i],
            reg=given.reg[i],
            tol=tol,
            max_iter=max_iter,
            g=None if start is None else start[i],
            method=method,
            watch=None if watch is None else functools.partial(watch, i),
        )
        for i in range(len(cost))
    ]
    trace = np.empty((len(cost), max_iter, 6))
    for i, one in enumerate(solved):
        trace[i, : one.iterations] = np.array(one.trace).reshape(one.iterations, 6)
    facts = [
        (s.iterations, s.marginal_error, s.cost, 0, s.value, s.marginal_error <= tol)
        for s in solved
    ]
    f, g = (np.stack([getattr(s, name) for s in solved]) for name in "fg")
    return f, g, np.array(facts, dtype=float), trace


def _adjoint_cpu(
    given: Problem, f: NDArray[Any], g: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """x, y and residuals of ``a x + P y = rows``, ``Pᵀ x + b y = columns`` for each problem."""
    problems, n, m = given.shape
    x, y, residuals = np.empty((problems, n)), np.empty((problems, m)), np.empty(problems)
    space = _workspace(problems, n, m, False)
    _C.transport_adjoint(
        given.cost, given.a, given.b, given.reg, g, rows, columns, x, y, residuals, *space
    )
    return x, y, residuals


def _adjoint_reference(
    given: Problem, f: NDArray[Any], g: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    cost = _arrays.to_float64(given.cost)
    regs = given.reg.tolist()
    solved = [
        reference.adjoint(cost[i], f[i], g[i], rows[i], columns[i], reg)
        for i, reg in enumerate(regs)
    ]
    x, y = (np.stack(part) for part in zip(*solved, strict=True))
    return x, y, np.zeros(len(cost))


_ADJOINTS = {"cpu": _adjoint_cpu, "reference": _adjoint_reference}


def _result(
    cost: Any, a: Any, b: Any, given: Problem, solved: Solved, backend: str
) -> TransportResult:
    f, g, facts, trace = solved
    iterations, errors, costs, _, values, converged = facts.T
    value: Any = values.copy()
    first, second = _transport.like(cost, f), _transport.like(cost, g)
    wanted = any(_transport.is_torch(x) and x.requires_grad for x in (cost, a, b))
    if wanted:
        value, first, second = _with_gradients(cost, a, b, given, f, g, values, backend)
    batch = TransportResult(
        f=first,
        g=second,
        cost=costs.copy(),
        value=value,
        marginal_error=errors.copy(),
        iterations=iterations.astype(np.int64),
        converged=converged.astype(bool),
        reg=given.reg,
        _cost_matrix=_differentiable(cost, given) if wanted else given.cost,
        _trace=trace,
    )
    return batch if given.batched else batch[0]


def _differentiable(cost: Any, given: Problem) -> Any:
    """The cost as (problems, n, m) with its place in autograd's graph, if it has one."""
    if not _transport.is_torch(cost):
        return sys.modules["torch"].from_numpy(np.ascontiguousarray(given.cost))
    return cost if given.batched else cost[None]


def _with_gradients(
    cost: Any, a: Any, b: Any, given: Problem, f: Any, g: Any, values: NDArray[Any], backend: str
) -> tuple[Any, Any, Any]:
    """Values, f and g as tensors of all problems that autograd can go on from."""
    from fusedopt.steps._transport_autograd import Potentials, Value

    torch = sys.modules["torch"]
    tensors = [x if _transport.is_torch(x) else None for x in (cost, a, b)]
    device = cost.device if _transport.is_torch(cost) else "cpu"
    first, second, reg, value = (
        torch.as_tensor(x, device=device) for x in (f, g, given.reg, values)
    )
    graded = Value.apply(*tensors, first, second, reg, value, given.batched)
    return graded, *Potentials.apply(*tensors, first, second, given, _ADJOINTS.get(backend))


_LAUNCHERS = {
    "cpu": _launch_cpu,
    "cuda": _transport_gpu.launch_cuda,
    "reference": _launch_reference,
}
_STEPS = {name: _LAUNCHERS[name] for name in ("cpu", "cuda")}
OPERATION = backends.register(
    backends.Operation("sinkhorn_newton_sparse", _LAUNCHERS, _transport.DTYPES)
)
SINKHORN_STEP = backends.register(backends.Operation("sinkhorn_step", _STEPS, _transport.DTYPES))
SNS_NEWTON_STEP = backends.register(
    backends.Operation("sns_newton_step", _STEPS, _transport.DTYPES)
)
