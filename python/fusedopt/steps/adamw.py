"""AdamW as a functional step, and over a torch optimizer's parameter groups."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fusedopt import _C, _arrays, _options, backends
from fusedopt._threads import get_num_threads
from fusedopt.references import adamw as reference

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "complex64", "complex128"})

_local = threading.local()


def adamw_step(
    params: Sequence[Any],
    grads: Sequence[Any],
    exp_avgs: Sequence[Any],
    exp_avg_sqs: Sequence[Any],
    *,
    step: Any,
    lr: Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 1e-2,
    max_exp_avg_sqs: Sequence[Any] | None = None,
    maximize: bool = False,
    grad_scale: Any = None,
    found_inf: Any = None,
    stream: int | None = None,
    backend: str | None = None,
) -> None:
    """Update lists of arrays in place by one step of AdamW.

    ``m ← β₁m + (1−β₁)g``, ``v ← β₂v + (1−β₂)g²``,
    ``p ← p(1 − lr·λ) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)``.

    Args:
        params: arrays of torch, NumPy or any DLPack library; float32, float64, bfloat16 or float16
            (complex ones count as pairs of reals), any shape, any layout whose elements do not
            share memory. Written. Lists may mix dtypes and shapes.
        grads: same shapes; each of any of these dtypes, any layout. Only read.
        exp_avgs, exp_avg_sqs: first and second moments, same shapes; each of the parameter's
            dtype, or float32 or bfloat16. Written.
        step: this step's number, from 1, as an int; or arrays that count the steps taken and are
            incremented unless ``found_inf``: one 0-d array for all, or one counter per tensor as a
            list of one-element arrays or one 1-d array.
        lr, weight_decay: a number ≥ 0, a 0-d array, or one number per tensor. Decay is decoupled
            and multiplied by ``lr``, as in ``torch.optim.AdamW``.
        betas: two numbers in [0, 1).
        eps: ≥ 0, outside the root.
        max_exp_avg_sqs: the running maxima of AMSGrad, like ``exp_avg_sqs``; written.
        maximize: ascend instead of descend.
        grad_scale: divide gradients by this number (loss scaling); they are not written.
        found_inf: if it is not zero, nothing is written at all.
        stream: for GPU backends; the CPU has none.
        backend: ``"cpu" | "cuda" | "triton" | "reference"``; ``None`` follows the arrays.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing is written.
        RuntimeError: the backend is not available here.

    Source: Loshchilov & Hutter, arXiv:1711.05101; AMSGrad: Reddi et al., arXiv:1904.09237.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs is not None:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    _options.same_length(**lists)
    launch = OPERATION.launchers[backends.choose(OPERATION, backend, params)]
    if stream is not None:
        raise ValueError(f"stream is {stream!r}, but the arrays are on the CPU, which has none")
    options: dict[str, Any] = {
        "lr": _options.number_per_tensor("lr", lr, len(params)),
        "weight_decay": _options.number_per_tensor("weight_decay", weight_decay, len(params)),
        "beta1": _options.number("betas[0]", betas[0], 0.0, 1.0),
        "beta2": _options.number("betas[1]", betas[1], 0.0, 1.0),
        "eps": _options.number("eps", eps, 0.0),
        "maximize": bool(maximize),
    }
    scale = 1.0 if grad_scale is None else _grad_scale(grad_scale)
    step = _step(step, len(params))
    plan = _plan()
    try:
        plan.begin(scale)
        plan.add_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step, **options)
        plan.check()
        if not _is_set(found_inf):
            launch(plan, lists, step, scale, options)
    finally:
        plan.clear()


def param_groups_step(
    param_groups: Iterable[dict[str, Any]],
    state: dict[Any, dict[str, Any]],
    init_state: Callable[[dict[str, Any], list[Any]], None],
    plan: _C.AdamWPlan,
    *,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> None:
    """One step over a torch optimizer's own structures, on the CPU.

    Args:
        param_groups, state: the optimizer's.
        init_state: called with a group and its parameters that have a gradient but no state yet.
        plan: kept by the optimizer between steps.
        grad_scale, found_inf: as in ``adamw_step``.
    """
    scale = 1.0 if grad_scale is None else _grad_scale(grad_scale)
    try:
        while missing := _add_groups(plan, scale, param_groups, state):
            for group, params in missing:
                init_state(group, params)
        plan.check()
        if not _is_set(found_inf):
            _arrays.bump_tensor_versions(plan.updated())
            plan.launch(get_num_threads())
    finally:
        plan.clear()


def _add_groups(
    plan: _C.AdamWPlan,
    scale: float,
    param_groups: Iterable[dict[str, Any]],
    state: dict[Any, dict[str, Any]],
) -> list[tuple[dict[str, Any], list[Any]]]:
    plan.begin(scale)
    missing = []
    for index, group in enumerate(param_groups):
        beta1, beta2 = group["betas"]
        params = plan.add_group(
            index,
            group["params"],
            state,
            float(group["lr"]),
            float(group["weight_decay"]),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
        )
        if params:
            missing.append((group, params))
    return missing


def _plan() -> _C.AdamWPlan:
    """This thread's plan: it remembers which table passed the overlap check."""
    plan: _C.AdamWPlan | None = getattr(_local, "plan", None)
    if plan is None:
        plan = _local.plan = _C.AdamWPlan()
    return plan


def _step(step: Any, count: int) -> Any:
    if isinstance(step, bool):
        raise TypeError(f"step is {step!r}, expected a whole number >= 1 or arrays")
    if isinstance(step, int) and step < 1:
        raise ValueError(f"step is {step}, but steps count from 1")
    if isinstance(step, Sequence) or getattr(step, "ndim", 0) == 1:
        if len(step) != count:
            raise ValueError(f"step has {len(step)} counters, expected {count}: one a tensor")
        return list(step) if isinstance(step, Sequence) else [step[i : i + 1] for i in range(count)]
    return step


def _grad_scale(grad_scale: Any) -> float:
    scale = _options.number("grad_scale", grad_scale, 0.0)
    if scale == 0.0:
        raise ValueError("grad_scale is 0, expected a number > 0")
    return scale


def _is_set(found_inf: Any) -> bool:
    return found_inf is not None and float(found_inf) != 0.0


def _launch_cpu(
    plan: _C.AdamWPlan,
    lists: dict[str, Sequence[Any]],
    step: Any,
    scale: float,
    options: dict[str, Any],
) -> None:
    written = [array for name, arrays in lists.items() if name != "grads" for array in arrays]
    _arrays.bump_versions(written)
    plan.launch(get_num_threads())


def _launch_reference(
    plan: _C.AdamWPlan,
    lists: dict[str, Sequence[Any]],
    step: Any,
    scale: float,
    options: dict[str, Any],
) -> None:
    counters = [] if isinstance(step, int) else step if isinstance(step, list) else [step]
    taken = [int(_arrays.to_float64(counter).item()) + 1 for counter in counters]
    values: dict[str, Any] = {
        name: [_arrays.to_float64(a) for a in arrays] for name, arrays in lists.items()
    }
    result = reference.adamw_step(
        **values,
        step=step if isinstance(step, int) else taken if isinstance(step, list) else taken[0],
        lr=_one_or_all(options["lr"]),
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=_one_or_all(options["weight_decay"]),
        maximize=options["maximize"],
        grad_scale=scale,
    )
    for name, arrays in lists.items():
        if name != "grads":
            for array, value in zip(arrays, getattr(result, name), strict=True):
                _arrays.assign(array, value)
    for counter, number in zip(counters, taken, strict=True):
        _arrays.assign(counter, number)


def _one_or_all(numbers: list[float]) -> float | list[float]:
    return numbers[0] if len(numbers) == 1 else numbers


OPERATION = backends.register(
    backends.Operation("adamw_step", {"cpu": _launch_cpu, "reference": _launch_reference}, DTYPES)
)
