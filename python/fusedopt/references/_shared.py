"""What the references of Adam's family have in common."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def each(value: Any, count: int) -> list[Any]:
    """One for all, or one per tensor, as one per tensor."""
    return list(value) if np.ndim(value) else [value] * count


def reals(array: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy; complex numbers as pairs along a last axis."""
    values = np.asarray(array)
    if values.dtype.kind == "c":
        return np.stack([values.real, values.imag], axis=-1).astype(np.float64)
    return values.astype(np.float64)


def like(values: Array, array: ArrayLike) -> Array:
    """The inverse of ``reals``: complex where ``array`` is."""
    return values[..., 0] + 1j * values[..., 1] if np.asarray(array).dtype.kind == "c" else values


def descend(
    p: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Array:
    """Decay, then a step along ``m`` over the root of ``v``, both with bias correction."""
    beta1, beta2 = betas
    root = np.sqrt(v) / np.sqrt(1 - beta2**step)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = p * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / (root + eps)
    return result
