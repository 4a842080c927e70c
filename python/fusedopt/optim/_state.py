"""State tensors of the optimizer classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

# States of parameters up to this many elements are cut from one buffer: with thousands of them,
# cache and TLB misses between their separate allocations would cost more than the update. Larger
# ones are allocated each on its own, so that no large buffer outlives its parameter.
SMALL = 16 * 1024
ALIGNMENT = 64  # bytes between the starts of two states, so that none shares a cache line

# Large allocations begin at the same offset in a page. Streams that run along in step at equal
# offsets hinder each other in the cache (AdamW: 10-25 % of a step), so each kind of state is moved
# by another odd number of cache lines.
STAGGER_BYTES = 17 * 64


def zeros_like(params: Sequence[Tensor], dtype: torch.dtype | None, kind: int) -> list[Tensor]:
    """Zeros in each parameter's shape and layout; ``dtype=None`` keeps the parameter's dtype.

    Complex parameters have complex states, as torch's; a real ``dtype`` then gives the precision.
    ``kind`` numbers the optimizer's states from 1.
    """
    wanted = [dtype_of(p, dtype) for p in params]
    states: list[Tensor | None] = [None] * len(params)
    buffers: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, p in enumerate(params):
        if 0 < p.numel() <= SMALL and p.is_contiguous():
            buffers.setdefault((wanted[i], p.device), []).append(i)
        else:
            states[i] = _staggered_zeros(p, wanted[i], kind)
    for (state_dtype, device), members in buffers.items():
        unit = ALIGNMENT // state_dtype.itemsize
        offsets = [kind * STAGGER_BYTES // state_dtype.itemsize]
        for i in members:
            offsets.append(offsets[-1] + -(-params[i].numel() // unit) * unit)
        flat = torch.zeros(offsets[-1], dtype=state_dtype, device=device)
        for i, offset in zip(members, offsets, strict=False):
            states[i] = flat.as_strided(params[i].shape, params[i].stride(), offset)
    return [state for state in states if state is not None]


def _staggered_zeros(param: Tensor, dtype: torch.dtype, kind: int) -> Tensor:
    layout = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    shift = kind * STAGGER_BYTES // dtype.itemsize
    flat = torch.zeros(param.numel() + shift, dtype=dtype, device=param.device)
    return flat.as_strided(layout.shape, layout.stride(), shift)


def step_counters(count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zero-dimensional counters, cut from one buffer."""
    flat = torch.zeros(count, dtype=dtype, device=device)
    return [flat.as_strided((), (), i) for i in range(count)]


def dtype_of(param: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's states where the optimizer's ``state_dtype`` is ``dtype``."""
    if dtype is None:
        return param.dtype
    return dtype.to_complex() if param.is_complex() else dtype
