"""State tensors of the optimizer classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

# States of parameters up to this many elements are cut from one buffer: with thousands of them,
# cache and TLB misses between their separate allocations would cost more than the update. Larger
# ones are allocated each on its own, so that no large buffer outlives its parameter.
SMALL = 16 * 1024
ALIGNMENT = 16  # elements between the starts of two states, so that none shares a cache line


def zeros_like(params: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Zeros in each parameter's shape and layout; ``dtype=None`` keeps the parameter's dtype.

    Complex parameters have complex states, as torch's; a real ``dtype`` then gives the precision.
    """
    wanted = [_state_dtype(p, dtype) for p in params]
    states: list[Tensor | None] = [None] * len(params)
    buffers: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, p in enumerate(params):
        if 0 < p.numel() <= SMALL and p.is_contiguous():
            buffers.setdefault((wanted[i], p.device), []).append(i)
        else:
            states[i] = torch.zeros_like(p, dtype=wanted[i], memory_format=torch.preserve_format)
    for (state_dtype, device), members in buffers.items():
        offsets = [0]
        for i in members:
            offsets.append(offsets[-1] + -(-params[i].numel() // ALIGNMENT) * ALIGNMENT)
        flat = torch.zeros(offsets[-1], dtype=state_dtype, device=device)
        for i, offset in zip(members, offsets, strict=False):
            states[i] = flat.as_strided(params[i].shape, params[i].stride(), offset)
    return [state for state in states if state is not None]


def step_counters(count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zero-dimensional counters, cut from one buffer."""
    flat = torch.zeros(count, dtype=dtype, device=device)
    return [flat.as_strided((), (), i) for i in range(count)]


def _state_dtype(param: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return param.dtype
    return dtype.to_complex() if param.is_complex() else dtype
