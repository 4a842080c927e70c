"""Newton–Schulz orthogonalization as a functional step."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedopt import _C, _arrays, _gpu, backends
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt._threads import get_num_threads
from fusedopt.references import newton_schulz as reference
from fusedopt.steps import _adam

DTYPES = frozenset(schedules.DTYPES)


def newton_schulz(
    G: Any,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Any] = "jordan",
    method: str = "auto",
    dtype: Any = None,
    restarts: Sequence[int] | None = None,
    backend: str | None = None,
    stream: int | None = None,
) -> Any:
    """Orthogonalize matrices by Newton–Schulz iteration.

    Maps each matrix ``U S Vᵀ`` to ``U p(S/‖S‖) Vᵀ`` with ``p`` the composed odd polynomials
    ``ax + bx³ + cx⁵``, so that the singular values come close to 1.

    Args:
        G: array of torch, NumPy or any DLPack library, shape ``(..., m, n)``; float32, float64,
            bfloat16 or float16, any finite scale, any strides; not modified. On a GPU, of torch.
        steps: number of iterations, at least 1.
        coefficients: ``"jordan"``, ``"polar_express"`` (safety factor 1.01), ``"you"`` or
            ``"cubic"``; ``(a, b, c)``; or a list of at most ``steps`` of them, whose last one is
            repeated.
        method: ``"standard"`` multiplies the whole matrix in each step, ``"gram"`` only its Gram
            matrix: fewer operations the longer the matrix is, but in full precision less accurate.
            ``"auto"`` is ``"gram"`` on the CPU for matrices at least 1.5 times as long as wide
            whose input has half precision (by its own dtype or by ``dtype``), where the input's
            rounding outweighs that; on a GPU for those at least twice as long in Jordan's five
            steps in float16; else ``"standard"``.
        dtype: each matrix, scaled by a power of two so that no range is exceeded, is rounded to it
            first; ``None``: it stays as it is. On the CPU arithmetic is in float64 for float64, in
            float32 (or better) for all others, and rounded to ``G``'s dtype at the end; only where
            the CPU multiplies bfloat16 (AVX512-BF16) are products of matrices rounded to it summed
            in float32 and rounded to it again. On a GPU products read and write ``dtype`` and add
            up in float32 (float64); ``"gram"`` in half precision does so in Jordan's five steps in
            float16 or where ``restarts`` are given, and else reads and writes float32.
        restarts: steps, counting from 0, before which the Gram form computes the matrix itself and
            its Gram matrix anew; ``None``: none in float32 and float64, which need none.
        backend: as in ``adamw_step``.
        stream: as in ``adamw_step``.

    Returns:
        A new array of ``G``'s library, shape, dtype and device. (From DLPack libraries without
        ``__array_namespace__``: of NumPy.) A zero matrix gives zero; a matrix with NaN or Inf gives
        NaN, whatever else is in the batch.

    Raises:
        TypeError: ``G`` is not floating point.
        ValueError: fewer than two dimensions, or an option does not fit; the message names it.
        RuntimeError: the backend is not available here.

    Source: Jordan 2024 (Muon); Amsel et al., arXiv:2505.16932 (Polar Express); the Gram form:
    Dao-AILab 2026.
    """
    own = _check(G)
    name = backends.choose(OPERATION, backend, [G])
    _adam.check_stream(stream, name)
    rounding = own if dtype is None else backends.dtype_name(dtype)
    arithmetic = schedules.arithmetic(name, rounding)
    schedule = schedules.make(
        coefficients, steps, method, rounding, arithmetic, restarts, diagonals_apart=name == "cpu"
    )
    result = _empty_like(G, name, stream)
    OPERATION.launchers[name](G, result, schedule, stream)
    return _handed_back(result, G)


def _check(array: Any) -> str:
    """The name of an array's dtype, once it is one we take."""
    own = backends.dtype_name(getattr(array, "dtype", type(array)))
    shape = tuple(getattr(array, "shape", ()))
    if own not in DTYPES:
        wanted = "float32, float64, bfloat16 or float16"
        raise TypeError(f"G (shape {shape}, {own}): expected {wanted}")
    if len(shape) < 2:
        raise ValueError(f"G (shape {shape}, {own}): expected at least two dimensions")
    return own


def _empty_like(array: Any, backend: str, stream: int | None) -> Any:
    """A new C-contiguous array for the result: torch's for torch, else NumPy's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _gpu.empty(array.shape, array.dtype, array.device, stream)
    if backend in backends.GPU:
        raise TypeError(
            f"G is {type(array).__module__}.{type(array).__name__}, but backend {backend!r} takes "
            "tensors of torch on a GPU: the result's memory comes from torch"
        )
    dtype = backends.dtype_name(array.dtype)
    if isinstance(array, np.ndarray):
        return np.empty(array.shape, array.dtype)
    if dtype == "bfloat16":
        raise TypeError("G: bfloat16 of a library other than torch and NumPy is not supported")
    return np.empty(tuple(array.shape), dtype)


def _handed_back(result: Any, array: Any) -> Any:
    """The result as an array of ``array``'s library."""
    if isinstance(result, np.ndarray) and not isinstance(array, np.ndarray):
        namespace = getattr(array, "__array_namespace__", None)
        return result if namespace is None else namespace().from_dlpack(result)
    return result


def _launch_cpu(array: Any, result: Any, schedule: schedules.Schedule, *_: Any) -> None:
    plan = _adam.thread_plan(_C.NewtonSchulzPlan)
    plan.run(array, result, schedule.compiled(), get_num_threads())


def _launch_cuda(array: Any, result: Any, schedule: schedules.Schedule, stream: int | None) -> None:
    plan = _adam.thread_plan(_C.NewtonSchulzPlan)
    try:
        gpu, current, size = plan.prepare_gpu(array, result, schedule.compiled())
        memory = _gpu.workspace(size, gpu, array, stream)
        chosen = current if stream is None else stream
        if chosen is None:
            chosen = _gpu.current_stream(gpu, array)
        plan.launch_gpu(chosen, memory.data_ptr())
    finally:
        plan.clear()


def _launch_triton(
    array: Any, result: Any, schedule: schedules.Schedule, stream: int | None
) -> None:
    _adam.triton_room("newton_schulz").launch(array, result, schedule, stream)


def _launch_reference(array: Any, result: Any, schedule: schedules.Schedule, *_: Any) -> None:
    _arrays.assign(result, reference.run(_arrays.to_float64(array), schedule))


LAUNCHERS = {
    "cpu": _launch_cpu,
    "cuda": _launch_cuda,
    "triton": _launch_triton,
    "reference": _launch_reference,
}
OPERATION = backends.register(backends.Operation("newton_schulz", LAUNCHERS, DTYPES))
