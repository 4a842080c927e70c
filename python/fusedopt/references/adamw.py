"""AdamW in float64 NumPy: what every backend is tested against."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedopt.references._shared import Array, descend, each, like, reals


class AdamWResult(NamedTuple):
    """New arrays, in the order of the arguments."""

    params: list[NDArray[np.float64]]
    exp_avgs: list[NDArray[np.float64]]
    exp_avg_sqs: list[NDArray[np.float64]]
    max_exp_avg_sqs: list[NDArray[np.float64]] | None


def adamw_step(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike],
    exp_avgs: Sequence[ArrayLike],
    exp_avg_sqs: Sequence[ArrayLike],
    *,
    step: int | Sequence[int],
    lr: float | Sequence[float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 1e-2,
    max_exp_avg_sqs: Sequence[ArrayLike] | None = None,
    maximize: bool = False,
    grad_scale: float | None = None,
    found_inf: float | None = None,
) -> AdamWResult:
    """One step of AdamW as a pure function.

    Arguments as ``fusedopt.adamw_step``, as anything NumPy can convert; complex arrays are updated
    as pairs of reals. ``step``, ``lr`` and ``weight_decay``: one for all, or one per tensor.

    Source: Loshchilov & Hutter, arXiv:1711.05101, in the form of ``torch.optim.AdamW``.
    """
    count = len(params)
    steps, rates, decays = (each(x, count) for x in (step, lr, weight_decay))
    maxima = [None] * count if max_exp_avg_sqs is None else [reals(u) for u in max_exp_avg_sqs]
    sign = (-1.0 if maximize else 1.0) / (grad_scale or 1.0)
    result = AdamWResult([], [], [], None if max_exp_avg_sqs is None else [])
    for i in range(count):
        p, g, m, v = (reals(x[i]) for x in (params, grads, exp_avgs, exp_avg_sqs))
        u = maxima[i]
        if not found_inf:
            p, m, v, u = _update(
                p, sign * g, m, v, u, int(steps[i]), rates[i], betas, eps, decays[i]
            )
        result.params.append(like(p, params[i]))
        result.exp_avgs.append(like(m, params[i]))
        result.exp_avg_sqs.append(like(v, params[i]))
        if result.max_exp_avg_sqs is not None and u is not None:
            result.max_exp_avg_sqs.append(like(u, params[i]))
    return result


def _update(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    u: Array | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Array, Array, Array, Array | None]:
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    u = None if u is None else np.maximum(u, v)
    p = descend(p, m, v if u is None else u, step, lr, betas, eps, weight_decay)
    return p, m, v, u
