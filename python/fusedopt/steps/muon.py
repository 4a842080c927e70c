"""Muon and NorMuon as functional steps, and over a torch optimizer's parameter groups."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fusedopt import _C, _arrays, _options, backends, partitions
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt.references import muon as reference
from fusedopt.steps import _adam

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16"})
SCALES = ("original", "match_rms_adamw", "spectral", "rms_norm", "none")
FORMS = ("ema", "sum")
AXES = ("row", "short")
NS_DTYPES = ("bfloat16", "float16", "float32")


def muon_step(
    params: Sequence[Any],
    grads: Sequence[Any],
    momentum_buffers: Sequence[Any],
    *,
    lr: Any = 1e-3,
    weight_decay: Any = 0.1,
    momentum: Any = 0.95,
    nesterov: bool = True,
    ns_coefficients: Any = "jordan",
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    ns_dtype: Any = None,
    ns_method: str = "auto",
    momentum_form: str = "ema",
    cautious_weight_decay: bool = False,
    maximize: bool = False,
    partitions: Any = "tensor",
    grad_scale: Any = None,
    found_inf: Any = None,
    stream: int | None = None,
    backend: str | None = None,
) -> None:
    """Update lists of matrices in place by one step of Muon.

    ``m ← μm + (1−μ)g``, ``u = μm + (1−μ)g`` (or ``m`` without Nesterov's step ahead),
    ``o = newton_schulz(u)``, ``p ← p(1 − lr·λ) − lr·a(rows, columns)·o``.

    Args:
        params: arrays of torch, NumPy or any DLPack library; float32, float64, bfloat16 or float16,
            two axes or more (a convolution is a matrix, its first axis by all others), any layout
            whose elements do not share memory. Written. Lists may mix dtypes and shapes.
        grads: same shapes; each of any of these dtypes, any layout. Only read. ``None`` leaves its
            tensor alone.
        momentum_buffers: same shapes; each of the parameter's dtype, or float32 or bfloat16.
            Written.
        lr, weight_decay: a number ≥ 0, a 0-d array, or one per tensor. Decay is decoupled and
            multiplied by ``lr``, unscaled, as in ``torch.optim.Muon``.
        momentum: μ, a number ≥ 0 or a 0-d array.
        ns_coefficients, ns_steps, ns_method: as ``coefficients``, ``steps`` and ``method`` of
            ``newton_schulz``.
        adjust_lr_fn: a(rows, columns): ``"original"`` or None √max(1, rows/columns),
            ``"match_rms_adamw"`` and ``"rms_norm"`` 0.2·√max(rows, columns), ``"spectral"``
            √(rows/columns), ``"none"`` 1. Rows are outputs, columns inputs, of each piece that is
            orthogonalised on its own.
        ns_dtype: the precision that Newton–Schulz needs at least, ``"bfloat16"``, ``"float16"`` or
            ``"float32"``. On the CPU ``None`` is ``"bfloat16"``, as ``torch.optim.Muon`` has it,
            but float32 is what it computes in whatever is asked for, float64 for float64, and it
            rounds nothing to less; only where it multiplies bfloat16 (AVX512-BF16), and that is
            enough, does it do so. On a GPU this is what the products read and write; ``None`` is
            ``"float16"``, three bits more than bfloat16, and float64 for float64 parameters. Where
            half precision is enough, ``ns_method="auto"`` may take the Gram form for long matrices,
            which is faster and, in float32, far more accurate than that; ``newton_schulz`` says
            where.
        momentum_form: ``"ema"`` as above, or ``"sum"``: ``m ← μm + g``, ``u = μm + g``. The update
            is the same, the buffer is larger by ``1/(1−μ)``.
        cautious_weight_decay: decay only where ``o·p ≥ 0``.
        maximize: ascend instead of descend.
        partitions: a partition for all, or one per tensor: how a tensor is cut into matrices
            (``fusedopt.partitions.matrices``): ``"tensor"``, ``Heads``, lists of
            ``(slice, partition)`` for fused weights, ``Each("tensor")`` for banks of experts,
            ``Transposed("tensor")`` for weights stored (inputs, outputs).
        grad_scale, found_inf, stream, backend: as in ``adamw_step``.

    A matrix with NaN or Inf in ``u`` becomes NaN, and no other does. A zero one only decays.

    On a GPU nothing waits for the device: ``lr``, ``weight_decay``, ``momentum``, ``grad_scale``
    and ``found_inf`` that are arrays on it are read there, by the kernels, and their values are not
    checked. Every step takes memory beside the arrays there, from torch.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing is written.
        RuntimeError: the backend is not available here.

    Source: Jordan 2024; ``torch.optim.Muon``.
    """
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    name = backends.choose(MUON, backend, params)
    rule = options(
        name in backends.GPU,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
        ns_dtype=ns_dtype,
        ns_method=ns_method,
        momentum_form=momentum_form,
        cautious_weight_decay=cautious_weight_decay,
        maximize=maximize,
    )
    _step(MUON, name, lists, rule, lr, weight_decay, partitions, grad_scale, found_inf, stream)


def normuon_step(
    params: Sequence[Any],
    grads: Sequence[Any],
    momentum_buffers: Sequence[Any],
    row_sqs: Sequence[Any],
    *,
    lr: Any = 1e-3,
    weight_decay: Any = 0.1,
    momentum: Any = 0.95,
    nesterov: bool = True,
    ns_coefficients: Any = "jordan",
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    beta2: float = 0.95,
    axis: str = "row",
    ns_dtype: Any = None,
    ns_method: str = "auto",
    momentum_form: str = "ema",
    cautious_weight_decay: bool = False,
    maximize: bool = False,
    partitions: Any = "tensor",
    grad_scale: Any = None,
    found_inf: Any = None,
    stream: int | None = None,
    backend: str | None = None,
) -> None:
    """Update lists of matrices in place by one step of NorMuon: Muon with rows of like size.

    ``v_i ← β₂v_i + (1−β₂)·mean(o_i²)`` for every row i of ``o``, then ``o_i ← s·o_i/(√v_i + ε)``,
    with ``s`` such that the norm of ``o`` stays, and ``ε = 1e-10``.

    Args:
        row_sqs: one float32 per row, contiguous; piece after piece where ``partitions`` cuts a
            tensor. Written. Each step computes with them in float64 and rounds them once.
        beta2: a number in [0, 1).
        axis: ``"row"``: a statistic per output. ``"short"``: one per line of the longer axis, the
            mean running along the shorter one (per input where there are more inputs).
        params, grads, momentum_buffers and all others: as in ``muon_step``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing is written.
        RuntimeError: the backend is not available here.

    Source: Li et al., arXiv:2510.05491, in the form of the released code.
    """
    lists = {
        "params": params,
        "grads": grads,
        "momentum_buffers": momentum_buffers,
        "row_sqs": row_sqs,
    }
    name = backends.choose(NORMUON, backend, params)
    rule = options(
        name in backends.GPU,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
        ns_dtype=ns_dtype,
        ns_method=ns_method,
        momentum_form=momentum_form,
        cautious_weight_decay=cautious_weight_decay,
        maximize=maximize,
        beta2=beta2,
        axis=axis,
    )
    _step(NORMUON, name, lists, rule, lr, weight_decay, partitions, grad_scale, found_inf, stream)


def options(
    on_device: bool = False,
    *,
    momentum: Any,
    nesterov: Any,
    ns_coefficients: Any,
    ns_steps: Any,
    adjust_lr_fn: Any,
    ns_dtype: Any,
    ns_method: Any,
    momentum_form: Any,
    cautious_weight_decay: Any,
    maximize: Any,
    beta2: Any = 0.0,
    axis: Any = "row",
) -> dict[str, Any]:
    """The checked options of one call or group, as plans and references take them.

    With ``on_device``, a momentum on a GPU stays what it is: looking at it would wait for it.
    """
    if adjust_lr_fn is None:
        adjust_lr_fn = "original"
    for name, value, known in (
        ("adjust_lr_fn", adjust_lr_fn, SCALES),
        ("momentum_form", momentum_form, FORMS),
        ("axis", axis, AXES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    given = (_hashable(ns_coefficients), ns_steps, ns_method, _dtype(ns_dtype))
    if not (on_device and _options.on_gpu("momentum", momentum)):
        momentum = _options.number("momentum", momentum, 0.0)
    return {
        "momentum": momentum,
        "nesterov": bool(nesterov),
        "sum_form": momentum_form == "sum",
        "maximize": bool(maximize),
        "cautious_weight_decay": bool(cautious_weight_decay),
        "adjust_lr_fn": adjust_lr_fn,
        "beta2": _options.number("beta2", beta2, 0.0, 1.0),
        "axis": axis,
        "ns_coefficients": ns_coefficients,
        "ns_steps": ns_steps,
        "cpu_schedules": _cpu_schedules(*given),
        "gpu_schedules": _gpu_schedules(*given),
    }


def _hashable(coefficients: Any) -> Any:
    if isinstance(coefficients, (list, tuple)):
        return tuple(_hashable(c) for c in coefficients)
    return coefficients


def _dtype(ns_dtype: Any) -> str | None:
    name = None if ns_dtype is None else backends.dtype_name(ns_dtype)
    if name not in (None, *NS_DTYPES):
        raise ValueError(f"ns_dtype is {ns_dtype!r}, expected {', '.join(NS_DTYPES)} or None")
    return name


_Schedules = tuple[_C.NewtonSchulzSchedule, _C.NewtonSchulzSchedule]


@functools.lru_cache
def _cpu_schedules(coefficients: Any, steps: int, method: str, dtype: str | None) -> _Schedules:
    """Of parameters up to float32, and of float64 ones.

    The precision asked for decides on the form: nothing is rounded to less than the arithmetic of
    the CPU.
    """
    arithmetic = schedules.arithmetic("cpu", dtype or "bfloat16")
    narrow = schedules.make(
        coefficients, steps, method, dtype or "bfloat16", arithmetic, diagonals_apart=True
    )
    wide = schedules.make(coefficients, steps, method, dtype or "float64", "float64")
    return (
        narrow._replace(dtype=narrow.arithmetic).compiled(),
        wide._replace(dtype="float64").compiled(),
    )


@functools.lru_cache
def _gpu_schedules(coefficients: Any, steps: int, method: str, dtype: str | None) -> _Schedules:
    """The same for products that read and write the precision asked for."""
    narrow, wide = dtype or "float16", dtype or "float64"
    return (
        schedules.make(coefficients, steps, method, narrow, narrow).compiled(),
        schedules.make(coefficients, steps, method, wide, wide).compiled(),
    )


def row_count(partition: partitions.Partition, shape: Sequence[int], axis: str = "row") -> int:
    """How many statistics NorMuon keeps for a tensor: the length of its ``row_sq``."""
    found = partitions.matrices(partition, shape)
    return sum(m.outputs if axis == "row" else max(m.outputs, m.inputs) for m in found)


_per_tensor = partitions.per_tensor  # the argument of the steps hides the module


def new_plan(normuon: bool) -> _C.MuonPlan:
    """A plan, for an optimizer to keep."""
    return _C.MuonPlan(partitions.matrices, normuon)


def _new_muon_plan() -> _C.MuonPlan:
    return new_plan(False)


def _new_normuon_plan() -> _C.MuonPlan:
    return new_plan(True)


def _step(
    operation: backends.Operation,
    name: str,
    lists: dict[str, Sequence[Any]],
    rule: dict[str, Any],
    lr: Any,
    weight_decay: Any,
    kinds: Any,
    grad_scale: Any,
    found_inf: Any,
    stream: int | None,
) -> None:
    _options.same_length(**lists)
    params = lists["params"]
    on_device = name in backends.GPU
    _adam.check_stream(stream, name)
    lrs = _options.number_per_tensor("lr", lr, len(params), on_device)
    decays = _options.number_per_tensor("weight_decay", weight_decay, len(params), on_device)
    kinds = _per_tensor(kinds, len(params))
    scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device)
    plan = _adam.thread_plan(_new_normuon_plan if operation is NORMUON else _new_muon_plan)
    try:
        plan.begin(scale, found_inf, stream, False)
        plan.add_lists(
            params,
            lists["grads"],
            lists["momentum_buffers"],
            lists.get("row_sqs"),
            kinds,
            lrs,
            decays,
            rule["momentum"],
            rule,
        )
        plan.check()
        _adam.check_device(plan, name)
        if not skip:
            operation.launchers[name](plan, lists, stream, rule, lrs, decays, kinds, scale)
    finally:
        plan.clear()


def add_group(
    plan: _C.MuonPlan, state: dict[Any, dict[str, Any]], index: int, group: dict[str, Any]
) -> list[Any]:
    """Add a torch optimizer's group to a plan; returns its parameters that lack their state."""
    rule = options(True, **{key: group[key] for key in OPTION_KEYS if key in group})
    return plan.add_group(
        index,
        group["params"],
        state,
        group["partition"],
        _adam.number_or_on_device("lr", group["lr"]),
        _adam.number_or_on_device("weight_decay", group["weight_decay"]),
        rule["momentum"],
        rule,
    )


def launch(
    plan: _C.MuonPlan,
    stream: int | None = None,
    found_inf: Any = None,
    backend: str | None = None,
) -> None:
    """Everything that the plan holds; arguments as ``_adam.launch``'s."""
    _adam.launch(plan, MUON.name, stream=stream, found_inf=found_inf, backend=backend)


OPTION_KEYS = (
    *("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", "ns_dtype"),
    *("ns_method", "momentum_form", "cautious_weight_decay", "maximize", "beta2", "axis"),
)


def _launch_kernels(
    plan: _C.MuonPlan, lists: dict[str, Sequence[Any]], stream: int | None, *_: Any
) -> None:
    _adam.bump_written(lists)
    launch(plan, stream, backend="cuda")


def _launch_triton(
    plan: _C.MuonPlan, lists: dict[str, Sequence[Any]], stream: int | None, *_: Any
) -> None:
    _adam.bump_written(lists)
    if plan.gpus():
        launch(plan, stream, backend="triton")
    else:  # in the interpreter
        _adam.triton_room(MUON.name).launch(*plan.packed_on_cpu())


def _launch_reference(
    plan: _C.MuonPlan,
    lists: dict[str, Sequence[Any]],
    stream: int | None,
    rule: dict[str, Any],
    lrs: list[float],
    decays: list[float],
    kinds: list[Any],
    scale: float,
) -> None:
    values = {
        name: [None if a is None else _arrays.to_float64(a) for a in arrays]
        for name, arrays in lists.items()
    }
    step: Callable[..., Any] = reference.muon_step
    more: dict[str, Any] = {}
    if "row_sqs" in lists:
        step, more = reference.normuon_step, {"beta2": rule["beta2"], "axis": rule["axis"]}
    count = len(kinds)
    result = step(
        **values,
        lr=lrs * count if len(lrs) == 1 else lrs,
        weight_decay=decays * count if len(decays) == 1 else decays,
        momentum=rule["momentum"],
        nesterov=rule["nesterov"],
        ns_coefficients=rule["ns_coefficients"],
        ns_steps=rule["ns_steps"],
        adjust_lr_fn=rule["adjust_lr_fn"],
        momentum_form="sum" if rule["sum_form"] else "ema",
        cautious_weight_decay=rule["cautious_weight_decay"],
        maximize=rule["maximize"],
        partitions=kinds,
        grad_scale=scale,
        **more,
    )
    for name, arrays in lists.items():
        if name != "grads":
            for array, value in zip(arrays, getattr(result, name), strict=True):
                _arrays.assign(array, value.reshape(tuple(array.shape)))


LAUNCHERS = {
    "cpu": _launch_kernels,
    "cuda": _launch_kernels,
    "triton": _launch_triton,
    "reference": _launch_reference,
}
MUON = backends.register(backends.Operation("muon_step", LAUNCHERS, DTYPES))
NORMUON = backends.register(backends.Operation("normuon_step", LAUNCHERS, DTYPES))
