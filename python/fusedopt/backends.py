"""Which backends exist here, why one is missing, and which one a call gets.

An operation registers itself with a launcher per backend (see ``steps/adamw.py``); nothing here
knows any of them by name.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fusedopt import _C

NAMES = ("cpu", "cuda", "triton", "reference")
GPU = ("cuda", "triton")  # those that run on a stream

# Which of "cuda" and "triton" runs an operation on a GPU when the caller does not say, by
# operation and architecture ("sm_90"), to be settled by measurement on that architecture. Where
# there is no entry, "cuda" does. Not measured yet: from Hopper on, Triton's products use
# instructions (wgmma, tcgen05) that our CUDA kernels do not.
GPU_DEFAULT: dict[tuple[str, str], str] = {
    ("newton_schulz", f"sm_{arch}"): "triton" for arch in (90, 100, 103, 110, 120, 121)
}


@dataclass(frozen=True)
class Operation:
    """A public operation: its launcher on each backend and the dtypes it takes."""

    name: str
    launchers: dict[str, Callable[..., Any]]
    dtypes: frozenset[str]


_operations: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Make an operation known to ``supports`` and ``env``."""
    _operations[operation.name] = operation
    return operation


# (the GPUs' architectures, the CUDA runtime's version, why there is no GPU): asked for once.
cuda_devices = functools.cache(_C.cuda_devices)


def why_missing(backend: str) -> str:
    """Why a backend can't run on this machine; empty if it can."""
    if backend == "cuda":
        architectures, _, why = cuda_devices()
        return why or why_no_kernel(architectures)
    if backend == "triton":
        return _why_no_triton()
    return ""


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _why_no_triton() -> str:
    for package in ("triton", "torch"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install fusedopt[triton]"
    if triton_is_interpreted():
        return ""
    import torch

    return "" if torch.cuda.is_available() else "torch finds no GPU"


def why_no_kernel(architectures: Sequence[int]) -> str:
    """Why this build runs on none of the devices; empty if it runs on one."""
    if any(_is_built(architecture) for architecture in architectures):
        return ""
    here = ", ".join(f"cuda:{i} is sm_{a}" for i, a in enumerate(architectures))
    return f"no kernels for the devices here ({here}); built for the architectures {_C.cuda_archs}"


def _is_built(architecture: int) -> bool:
    """Machine code runs on later devices of its generation, PTX on all later ones."""
    for entry in _C.cuda_archs.split():
        number = int(entry.removesuffix("-real"))
        if number <= architecture and (
            not entry.endswith("-real") or number // 10 == architecture // 10
        ):
            return True
    return False


def device_type(array: Any, name: str = "params[0]") -> str:
    """``"cpu"``, ``"cuda"`` or what else the array says its device is.

    Raises:
        TypeError: ``name`` is no array that kernels can take.
    """
    kind = _C.device_of(array, name)[0]
    return {1: "cpu", 2: "cuda", 3: "cpu"}.get(kind, f"DLPack device type {kind}")


def gpu_default(operation: str, device: int) -> str:
    """The backend that runs an operation on this GPU when the caller does not say."""
    architectures = cuda_devices()[0]
    arch = f"sm_{architectures[device]}" if device < len(architectures) else ""
    return GPU_DEFAULT.get((operation, arch), "cuda")


def choose(operation: Operation, backend: str | None, arrays: Sequence[Any]) -> str:
    """The name of the backend that a call gets: the one asked for, or the arrays' own.

    Raises:
        ValueError: no such backend, or the operation has no kernel for it.
        RuntimeError: the backend can't run here; the message says why.
    """
    if backend is None:
        device = device_type(arrays[0]) if len(arrays) else "cpu"
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{operation.name}: arrays are on {device!r}, expected cpu or cuda")
        gpu = device == "cuda"
        backend = gpu_default(operation.name, _C.device_of(arrays[0], "")[1]) if gpu else "cpu"
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(NAMES)} or None")
    missing = why_missing(backend)
    if missing:
        raise RuntimeError(f"backend {backend!r} is not available: {missing}")
    if backend not in operation.launchers:
        raise ValueError(f"{operation.name} has no kernel on backend {backend!r}")
    return backend


def supports(
    op: str,
    backend: str | None = None,
    dtypes: Iterable[Any] = (),
    device: str = "cpu",
) -> tuple[bool, str]:
    """Whether an operation can run here.

    Args:
        op: a public name, such as ``"adamw_step"``.
        backend: one of ``"cpu" | "cuda" | "triton" | "reference"``; ``None`` follows ``device``.
        dtypes: dtypes of torch or NumPy, or their names.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``(True, "")``, or ``(False, why)``.
    """
    if op not in _operations:
        return False, f"no operation {op!r}; there are: {', '.join(sorted(_operations))}"
    operation = _operations[op]
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        return False, f"device is {device!r}, expected cpu or cuda"
    name = backend or kind
    if name not in NAMES:
        return False, f"backend is {name!r}, expected one of {', '.join(NAMES)}"
    if (name == "cpu") != (kind == "cpu") and name != "reference":
        return False, f"backend {name!r} does not run on device {kind!r}"
    if missing := why_missing(name):
        return False, f"backend {name!r} is not available: {missing}"
    if name not in operation.launchers:
        return False, f"{op} has no kernel on backend {name!r}"
    for dtype in dtypes:
        if dtype_name(dtype) not in operation.dtypes:
            return False, f"{op} does not take {dtype_name(dtype)}"
    return True, ""


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for ``torch.float32``, ``numpy.float32``, ``numpy.dtype("f4")`` and itself."""
    text = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(text).rsplit(".", 1)[-1]


def table() -> dict[str, str]:
    """Every backend, with ``"available"`` or why it is not."""
    return {name: why_missing(name) or "available" for name in NAMES}
