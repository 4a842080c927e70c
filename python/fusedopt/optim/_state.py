"""State tensors of the optimizer classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

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


def step_counters(
    params: Sequence[Tensor], dtype: torch.dtype, on_device: bool
) -> Iterator[Tensor]:
    """A zero-dimensional counter each, cut from one buffer a device.

    Args:
        on_device: where the parameters are; else on the CPU, as torch has them.
    """
    cpu = torch.device("cpu")
    devices = [p.device if on_device else cpu for p in params]
    flat = {d: torch.zeros(devices.count(d), dtype=dtype, device=d) for d in set(devices)}
    places = {d: count() for d in flat}
    return (flat[d].as_strided((), (), next(places[d])) for d in devices)


def without_state(state: Mapping[Any, dict[str, Any]], params: list[Tensor]) -> list[Tensor]:
    """The parameters that have none; of the others, the counters go to where the parameters are.

    A plan names those because their counter has to follow a found_inf on the GPU.
    """
    for p in params:
        if state[p]:
            step = state[p]["step"]
            state[p]["step"] = step.to(p.device, torch.float32, non_blocking=True)
    return [p for p in params if not state[p]]


def dtype_of(param: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's states where the optimizer's ``state_dtype`` is ``dtype``."""
    if dtype is None:
        return param.dtype
    return dtype.to_complex() if param.is_complex() else dtype


def vectors(
    counts: Sequence[int], params: Sequence[Tensor], dtype: torch.dtype, kind: int
) -> list[Tensor]:
    """Zeros of these lengths, each on its parameter's device; ``kind`` as in ``zeros_like``."""
    sized = zip(counts, params, strict=True)
    return zeros_like([torch.empty(n, dtype=dtype, device=p.device) for n, p in sized], dtype, kind)


def check_dtype(state_dtype: Any) -> None:
    """Raise unless states may have this dtype."""
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype is {state_dtype!r}, expected torch.float32, torch.bfloat16 or None"
        )


def load(
    optimizer: torch.optim.Optimizer,
    load_state_dict: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    wanted: Callable[[Tensor, dict[str, Any]], dict[str, torch.dtype]],
    edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda loaded: loaded,
) -> None:
    """torch's ``load_state_dict``, then what it would spoil: partitions and states' dtypes.

    Args:
        load_state_dict: torch's method.
        wanted: as ``restore_dtypes`` takes it.
        edit: checks and completes what is loaded, after the user's hooks.
    """
    final: list[dict[str, Any]] = []
    handle = optimizer.register_load_state_dict_pre_hook(
        lambda _, loaded: final.append(edit(loaded))
    )
    try:
        load_state_dict(state_dict)
    finally:
        handle.remove()
    for group, saved in zip(optimizer.param_groups, final[0]["param_groups"], strict=True):
        if "partition" in saved:  # torch copied it
            group["partition"] = saved["partition"]
    restore_dtypes(optimizer, final[0], wanted)


def restore_dtypes(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    wanted: Callable[[Tensor, dict[str, Any]], dict[str, torch.dtype]],
) -> None:
    """After loading ``state_dict``: give states the dtypes they should have, by key.

    torch casts every state to its parameter's dtype; what already has the wanted one keeps its
    bits.
    """
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for index, (group, p) in zip(ids, owners, strict=True):
        saved = state_dict["state"].get(index, {})
        for key, dtype in wanted(p, group).items():
            if key in saved and optimizer.state[p][key].dtype != dtype:
                optimizer.state[p][key] = saved[key].to(device=p.device, dtype=dtype, copy=True)
