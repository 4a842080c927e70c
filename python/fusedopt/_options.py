"""Checks of numeric options, with errors that name the option, what came and what was wanted."""

import math
from collections.abc import Sequence
from typing import Any

from fusedopt import backends


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """``value`` as a float in ``[low, high)``; 0-d and one-element arrays count as numbers.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside, or is NaN.
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected a number") from None
    if not low <= result < high:
        wanted = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        raise ValueError(f"{name} is {value!r}, expected a finite number {wanted}")
    return result


def on_gpu(name: str, value: Any) -> bool:
    """Whether ``value`` is an array on a GPU."""
    if isinstance(value, (int, float)) or not hasattr(value, "__dlpack_device__"):
        return False
    return backends.device_type(value, name) == "cuda"


def number_per_tensor(name: str, value: Any, count: int, on_device: bool) -> list[Any]:
    """One non-negative number for all tensors (a list of one), or one for each.

    With ``on_device``, arrays on a GPU stay what they are: looking at them would wait for it.

    Raises:
        TypeError, ValueError: as ``number``, or a sequence of another length.
    """
    if isinstance(value, str) or not (
        isinstance(value, Sequence) or (hasattr(value, "ndim") and value.ndim)
    ):
        return [value if on_device and on_gpu(name, value) else number(name, value, 0.0)]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers, expected one, or {count}: one a tensor")
    if on_device and on_gpu(name, value):  # one array; iterating it would read it
        return [value[i : i + 1] for i in range(count)] or [0.0]
    return [
        v if on_device and on_gpu(f"{name}[{i}]", v) else number(f"{name}[{i}]", v, 0.0)
        for i, v in enumerate(value)
    ] or [0.0]


def same_length(**lists: Any) -> None:
    """Raise unless all lists have as many arrays as the first.

    Raises:
        TypeError: an argument is a lone array, or no list.
        ValueError: lengths differ.
    """
    first, count = None, 0
    for name, arrays in lists.items():
        if isinstance(arrays, (str, dict)) or not isinstance(arrays, Sequence):
            raise TypeError(f"{name} is a {type(arrays).__name__}, expected a list of arrays")
        if first is None:
            first, count = name, len(arrays)
        elif len(arrays) != count:
            raise ValueError(f"{name} has {len(arrays)} arrays, but {first} has {count}")
