"""Blockwise Adam in float64 NumPy: what every backend is tested against."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedopt.partitions import Partition, block_count, block_ids, per_tensor
from fusedopt.references._shared import Array, descend, each, like, reals


class BlockwiseAdamResult(NamedTuple):
    """New arrays, in the order of the arguments; ``block_sqs`` are 1-d."""

    params: list[NDArray[Any]]
    exp_avgs: list[NDArray[Any]]
    block_sqs: list[NDArray[np.float64]]


def blockwise_adam_step(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike | None],
    exp_avgs: Sequence[ArrayLike],
    block_sqs: Sequence[ArrayLike],
    *,
    partitions: Partition | Sequence[Partition],
    step: int | Sequence[int],
    lr: float | Sequence[float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 1e-2,
    maximize: bool = False,
    grad_scale: float | None = None,
    found_inf: float | None = None,
) -> BlockwiseAdamResult:
    """One step of blockwise Adam as a pure function.

    AdamW, but ``v_b ← β₂v_b + (1−β₂) mean(g²)`` once for each block ``b`` of coordinates.

    Arguments as ``fusedopt.blockwise_adam_step``, as anything NumPy can convert; complex arrays are
    pairs of reals along one more axis. A gradient may be None: that tensor keeps all it has, except
    that ``"global"`` tensors all hold the value of their one block. It is the mean over the
    elements that have a gradient; where none has, it stays.

    Source: Xie, Mohamadi & Li, arXiv:2410.08198; bias correction and ε as in ``torch.optim.AdamW``.
    """
    count = len(params)
    steps, rates, decays = (each(x, count) for x in (step, lr, weight_decay))
    kinds = per_tensor(partitions, count)
    sign = (-1.0 if maximize else 1.0) / (grad_scale or 1.0)
    values = [reals(p) for p in params]
    moments = [reals(m) for m in exp_avgs]
    seconds = [reals(v).reshape(-1) for v in block_sqs]
    if not found_inf:
        gradients = [None if g is None else sign * reals(g) for g in grads]
        seconds = _second_moments(seconds, gradients, kinds, [x.shape for x in values], betas[1])
        for i, g in enumerate(gradients):
            if g is None or not g.size:
                continue
            moments[i] = betas[0] * moments[i] + (1 - betas[0]) * g
            v = seconds[i][block_ids(kinds[i], g.shape)]
            values[i] = descend(
                values[i], moments[i], v, int(steps[i]), rates[i], betas, eps, decays[i]
            )
    return BlockwiseAdamResult(
        [like(x, p) for x, p in zip(values, params, strict=True)],
        [like(m, p) for m, p in zip(moments, params, strict=True)],
        seconds,
    )


def _second_moments(
    seconds: list[Array],
    gradients: list[Array | None],
    kinds: list[Partition],
    shapes: list[tuple[int, ...]],
    beta2: float,
) -> list[Array]:
    """Every tensor's ``block_sq`` after this step."""
    joined = [i for i, kind in enumerate(kinds) if kind == "global"]
    for i, v in enumerate(seconds):
        if v.size != (wanted := block_count(kinds[i], shapes[i])):
            raise ValueError(
                f"block_sqs[{i}] has {v.size} elements, expected {wanted} "
                f"for partition {kinds[i]!r} of shape {shapes[i]}"
            )
    if any(seconds[i][0] != seconds[joined[0]][0] for i in joined):
        held = [float(seconds[i][0]) for i in joined]
        raise ValueError(f'block_sqs of "global" tensors are {held}, expected one value in all')
    result = list(seconds)
    for members in [joined, *([i] for i, kind in enumerate(kinds) if kind != "global")]:
        present = [(i, g) for i in members if (g := gradients[i]) is not None and g.size]
        if not present:
            continue
        ids = np.concatenate([block_ids(kinds[i], g.shape).reshape(-1) for i, g in present])
        squares = np.concatenate([np.square(g).reshape(-1) for _, g in present])
        v = seconds[members[0]]
        mean = np.bincount(ids, squares, v.size) / np.bincount(ids, minlength=v.size)
        for i in members:
            result[i] = beta2 * v + (1 - beta2) * mean
    return result
