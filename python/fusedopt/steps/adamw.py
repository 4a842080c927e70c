"""AdamW as a functional step, and over a torch optimizer's parameter groups."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fusedopt import _C, _options, backends
from fusedopt.references import adamw as reference
from fusedopt.steps import _adam

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "complex64", "complex128"})


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
            list of one-element arrays or one 1-d array. On the CPU or the parameters' device.
        lr, weight_decay: a number ≥ 0, a 0-d array, or one per tensor. Decay is decoupled and
            multiplied by ``lr``, as in ``torch.optim.AdamW``.
        betas: two numbers in [0, 1).
        eps: ≥ 0, outside the root.
        max_exp_avg_sqs: the running maxima of AMSGrad, like ``exp_avg_sqs``; written.
        maximize: ascend instead of descend.
        grad_scale: divide gradients by this number (loss scaling); they are not written.
        found_inf: if it is not zero, nothing is written at all.
        stream: for arrays on a GPU: the address of the CUDA stream to work on. By default the
            current stream of the arrays' library; one that does not tell needs this argument.
        backend: ``"cpu" | "cuda" | "triton" | "reference"``; ``None`` follows the arrays.

    On a GPU nothing waits for the device: ``step``, ``lr``, ``weight_decay``, ``grad_scale`` and
    ``found_inf`` that are arrays on it are read there, by the kernels, and their values are not
    checked. A CUDA graph of such a step replays it with the arrays' then current values.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing is written.
        RuntimeError: the backend is not available here.

    Source: Loshchilov & Hutter, arXiv:1711.05101; AMSGrad: Reddi et al., arXiv:1904.09237.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs is not None:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    _options.same_length(**lists)
    name = backends.choose(OPERATION, backend, params)
    on_device = name in backends.GPU
    _adam.check_stream(stream, name)
    options = _adam.options(len(params), lr, betas, eps, weight_decay, maximize, on_device)
    scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device)
    step = _adam.step_of(step, len(params))
    plan = _adam.thread_plan(_C.AdamWPlan)
    try:
        plan.begin(scale, found_inf, stream, False)
        plan.add_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step, **options)
        plan.check()
        _adam.check_device(plan, name)
        if not skip:
            OPERATION.launchers[name](plan, lists, stream, step, scale, options)
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
    """One step over a torch optimizer's own structures, on whatever devices its tensors are.

    Each device's tensors are updated in one pass. On GPUs nothing waits for the device, unless the
    optimizer has tensors on the CPU too and ``lr``, ``weight_decay``, ``grad_scale`` or
    ``found_inf`` lies on a GPU.

    Args:
        param_groups, state: the optimizer's.
        init_state: called with a group and its parameters that have a gradient but no state yet, or
            whose step counter has to move to their GPU.
        plan: kept by the optimizer between steps.
        grad_scale, found_inf: as in ``adamw_step``.
    """
    scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device=True)
    _adam.param_groups_step(
        plan,
        param_groups,
        begin=lambda: plan.begin(scale, found_inf, None, True),
        add_group=functools.partial(add_group, plan, state),
        init_state=init_state,
        launch=None
        if skip
        else functools.partial(_adam.launch, plan, OPERATION.name, found_inf=found_inf),
    )


def add_group(
    plan: _C.AdamWPlan, state: dict[Any, dict[str, Any]], index: int, group: dict[str, Any]
) -> list[Any]:
    """Add a torch optimizer's group to a plan; returns its parameters that lack their state."""
    beta1, beta2 = group["betas"]
    return plan.add_group(
        index,
        group["params"],
        state,
        _adam.number_or_on_device("lr", group["lr"]),
        _adam.number_or_on_device("weight_decay", group["weight_decay"]),
        _adam.beta("betas[0]", beta1),
        _adam.beta("betas[1]", beta2),
        float(group["eps"]),
        bool(group["amsgrad"]),
        bool(group["maximize"]),
    )


OPERATION = backends.register(
    backends.Operation("adamw_step", _adam.launchers("adamw_step", reference.adamw_step), DTYPES)
)
