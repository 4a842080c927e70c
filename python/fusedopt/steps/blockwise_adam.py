"""Blockwise Adam as a functional step, and over a torch optimizer's parameter groups."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fusedopt import _C, _options, backends, partitions
from fusedopt.references import blockwise_adam as reference
from fusedopt.steps import _adam

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16"})


def blockwise_adam_step(
    params: Sequence[Any],
    grads: Sequence[Any],
    exp_avgs: Sequence[Any],
    block_sqs: Sequence[Any],
    *,
    partitions: Any,
    step: Any,
    lr: Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 1e-2,
    maximize: bool = False,
    grad_scale: Any = None,
    found_inf: Any = None,
    stream: int | None = None,
    backend: str | None = None,
) -> None:
    """Update lists of arrays in place by one step of blockwise Adam.

    AdamW with one second moment per block ``b`` of coordinates:
    ``m ← β₁m + (1−β₁)g``, ``v_b ← β₂v_b + (1−β₂) mean_b(g²)``,
    ``p ← p(1 − lr·λ) − lr/(1−β₁ᵗ) · m / (√v_b/√(1−β₂ᵗ) + ε)``.

    Args:
        params: arrays of torch, NumPy or any DLPack library; float32, float64, bfloat16 or float16,
            any shape, any layout whose elements do not share memory. Written. Lists may mix dtypes
            and shapes.
        grads: same shapes; each of any of these dtypes, any layout. Only read. ``None`` leaves its
            tensor alone.
        exp_avgs: first moments, same shapes; each of the parameter's dtype, or float32 or bfloat16.
            Written.
        block_sqs: second moments, one float32 per block, contiguous; ``partitions.block_count``
            says how many. Written. Each step computes with them in float64 and rounds them once.
        partitions: a partition for all, or one per tensor: ``"coordinate" | "tensor" | "row" |
            "column" | "global"``, ``Heads``, ``Contiguous``, lists of ``(slice, partition)`` and
            the others of ``fusedopt.partitions``. Blocks are defined on row-major order, whatever
            the layout. ``"coordinate"`` is AdamW, bit for bit. All ``"global"`` tensors of a call
            are one block: their ``block_sqs`` hold its value, the same in each, and the mean is
            over the elements that have a gradient.
        step, lr, betas, eps, weight_decay, maximize, grad_scale, found_inf, stream, backend: as in
            ``adamw_step``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing is written.
        RuntimeError: the backend is not available here.

    Source: Xie, Mohamadi & Li, arXiv:2410.08198; Adam-mini: Zhang et al., arXiv:2406.16793.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "block_sqs": block_sqs}
    _options.same_length(**lists)
    name = backends.choose(OPERATION, backend, params)
    _adam.check_stream(stream, name)
    on_device = name in backends.GPU
    options = _adam.options(len(params), lr, betas, eps, weight_decay, maximize, on_device)
    kinds = _per_tensor(partitions, len(params))
    scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device)
    step = _adam.step_of(step, len(params))
    plan = _adam.thread_plan(new_plan)
    try:
        plan.begin(scale, found_inf, stream, False)
        plan.add_lists(params, grads, exp_avgs, block_sqs, kinds, step, **options)
        plan.check()
        _adam.check_device(plan, name)
        if not skip:
            OPERATION.launchers[name](plan, lists, stream, step, scale, options, partitions=kinds)
    finally:
        plan.clear()


_per_tensor = partitions.per_tensor  # the argument of the step hides the module


def new_plan() -> _C.BlockwiseAdamPlan:
    """A plan, for an optimizer or a thread to keep."""
    return _C.BlockwiseAdamPlan(partitions.resolve)


def param_groups_step(
    param_groups: list[dict[str, Any]],
    state: dict[Any, dict[str, Any]],
    init_state: Callable[[dict[str, Any], list[Any]], None],
    plan: _C.BlockwiseAdamPlan,
    *,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> None:
    """One step over a torch optimizer's own structures, on whatever devices its tensors are.

    Args:
        param_groups, state: the optimizer's; ``group["partition"]`` has one partition per
            parameter.
        init_state: called with a group and its parameters that have a gradient but no state yet, or
            whose step counter has to move to their GPU.
        plan: kept by the optimizer between steps.
        grad_scale, found_inf: as in ``adamw_step``.
    """
    scale, found_inf, skip = _adam.loss_scale(grad_scale, found_inf, on_device=True)

    def add_group(index: int, group: dict[str, Any]) -> list[Any]:
        beta1, beta2 = group["betas"]
        return plan.add_group(
            index,
            group["params"],
            state,
            group["partition"],
            _adam.number_or_on_device("lr", group["lr"]),
            _adam.number_or_on_device("weight_decay", group["weight_decay"]),
            _adam.beta("betas[0]", beta1),
            _adam.beta("betas[1]", beta2),
            float(group["eps"]),
            bool(group["maximize"]),
        )

    _adam.param_groups_step(
        plan,
        param_groups,
        begin=lambda: plan.begin(scale, found_inf, None, True),
        add_group=add_group,
        init_state=init_state,
        launch=None
        if skip
        else functools.partial(_adam.launch, plan, OPERATION.name, found_inf=found_inf),
    )


OPERATION = backends.register(
    backends.Operation(
        "blockwise_adam_step",
        _adam.launchers("blockwise_adam_step", reference.blockwise_adam_step),
        DTYPES,
    )
)
