"""What Python does with arrays of any library: version counters, and copies for the reference."""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def bump_versions(arrays: Iterable[Any]) -> None:
    """Tell autograd that torch tensors among ``arrays`` are about to be written behind its back.

    Without it, a backward pass through a tensor saved before the write would use the new values
    without an error.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    bump_tensor_versions([array for array in arrays if isinstance(array, torch.Tensor)])


def bump_tensor_versions(tensors: list[Any]) -> None:
    """The same for torch tensors alone."""
    torch = sys.modules["torch"]
    if any(t.is_inference() for t in tensors[:1]):  # they have no counter, and need none
        tensors = [t for t in tensors if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def to_float64(array: Any) -> NDArray[Any]:
    """A float64 (or complex128) NumPy copy."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        wide = torch.complex128 if array.is_complex() else torch.float64
        return np.asarray(array.detach().to("cpu", wide).resolve_conj().numpy())
    values = np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def assign(array: Any, values: Any) -> None:
    """Write values into an array, rounded to its dtype."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        with torch.no_grad():
            array.copy_(torch.as_tensor(values))
        return
    target = array if isinstance(array, np.ndarray) else np.from_dlpack(array)
    target[...] = values
