"""The tensor table on its way to a Triton kernel: sorted into launches, packed, sent to the device.

C++ validates the arrays and hands over the rows (``csrc/binding/packed.h``). Here they become one
buffer of 64-bit words in device memory:

- rows: an address for each role, then numel, head, scalars, layout;
- layouts as ``csrc/common/tensor_table.h`` has them: ndim, sizes, strides of each role;
- blocks, one word for each thread block of each launch: row | chunk << 32;
- whatever else the algorithm sends along, such as the rows' scalars.

A launch takes the rows of one `Kind`. The buffer travels through pinned memory on the caller's
stream, without waiting. A CUDA graph copies it anew at every replay, so the pinned side of what was
captured is kept until the process ends (80 bytes a tensor and 8 for each `CHUNK` elements). The
device side may be dropped after the launch: torch hands it out again in the order of the stream.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fusedopt.triton_kernels._storage import INTERPRETED

MAX_ROLES = 6  # kMaxRoles
NUMEL, LAYOUT, SCALARS, DTYPES = range(MAX_ROLES, MAX_ROLES + 4)  # columns of packed_rows
ITEMSIZE = (4, 8, 2, 2, 4, 8)  # by code of dtype

CHUNK = tl.constexpr(4096)  # elements of one thread block; a row's first chunk has its head besides
SPAN = tl.constexpr(
    8
)  # the main part of a row is a multiple of this: 16 bytes of the narrowest dtype
VECTOR_BYTES = 16

# How a launch reaches its rows: 16 bytes at a time, by single elements, or by strides.
VECTOR, SINGLE, STRIDED = (tl.constexpr(i) for i in range(3))

_captured: list[torch.Tensor] = []


@dataclass(frozen=True)
class Kind:
    """What the rows of one launch have in common: a dtype's code for each role, and the access."""

    dtypes: tuple[int, ...]
    access: int


@dataclass(frozen=True)
class Launch:
    """The thread blocks of one launch: how many, and where the word of the first stands."""

    kind: Kind
    thread_blocks: int
    block_at: int


@dataclass(frozen=True)
class Table:
    """All words, the launches they make, and where layouts and what was sent along begin."""

    words: NDArray[np.int64]
    launches: list[Launch]
    layouts_at: int
    more_at: list[int]


def pack(
    rows: NDArray[np.int64], layouts: NDArray[np.int64], roles: int, more: Sequence[NDArray[Any]]
) -> Table:
    """Sort the rows into launches and lay everything out; ``more`` is sent along."""
    dtypes = dtype_codes(rows, roles)
    head, access = _heads(rows, dtypes, roles)
    chunks = -(-(rows[:, NUMEL] - head) // CHUNK.value)
    columns = [rows[:, :roles], rows[:, [NUMEL]], head[:, None], rows[:, [SCALARS, LAYOUT]]]
    parts = [np.hstack(columns).ravel(), layouts, *(part.ravel().view(np.int64) for part in more)]
    at = np.cumsum([0, *(part.size for part in parts)]).tolist()
    launches, block_at = [], at[-1]
    for key, blocks in grouped(np.column_stack([dtypes, access]), chunks):
        parts.append(blocks)
        launches.append(Launch(Kind(key[:-1], key[-1]), blocks.size, block_at))
        block_at += blocks.size
    return Table(np.concatenate(parts), launches, at[1], at[2:-1])


def check_alignment(rows: NDArray[np.int64], names: Sequence[str]) -> None:
    """Raise if an array lies across its own elements' boundaries, where no GPU can access it.

    Raises:
        ValueError: names the argument and the address.
    """
    sizes = np.where(
        rows[:, : len(names)] == 0, 1, np.take(ITEMSIZE, dtype_codes(rows, len(names)))
    )
    bad = np.argwhere(rows[:, : len(names)] % sizes)
    if bad.size:
        row, role = bad[0]
        raise ValueError(
            f"an array of {names[role]} (of {rows[row, NUMEL]} elements) lies at address "
            f"{rows[row, role]:#x}, no multiple of its elements' {sizes[row, role]} bytes; copy it"
        )


def dtype_codes(rows: NDArray[np.int64], roles: int) -> NDArray[np.int64]:
    codes = rows[:, [DTYPES]] >> (8 * np.arange(roles)) & 0xFF
    return np.where(rows[:, :roles] == 0, -1, codes)


def _heads(
    rows: NDArray[np.int64], dtypes: NDArray[np.int64], roles: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many elements to leave to single accesses so that all roles are aligned behind them."""
    absent = dtypes < 0
    sizes = np.where(absent, VECTOR_BYTES, np.take(ITEMSIZE, dtypes))
    before = np.arange(SPAN.value)[:, None] * sizes[:, None]  # bytes, by row, head and role
    aligned = (rows[:, None, :roles] + before) % VECTOR_BYTES == 0
    fits = aligned.all(axis=2) & (np.arange(SPAN.value) < rows[:, [NUMEL]])
    vector, flat = fits.any(axis=1), rows[:, LAYOUT] < 0
    access = np.where(flat, np.where(vector, VECTOR.value, SINGLE.value), STRIDED.value)
    return np.where(flat & vector, fits.argmax(axis=1), 0), access


def grouped(
    keys: NDArray[np.int64], chunks: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64]]]:
    """Each key and the words of its rows' thread blocks.

    Args:
        keys, chunks: of each row, a line and a number of thread blocks.
        rows: the rows' places in the table, if these are not all of them.
    """
    keys, member_of = np.unique(keys, axis=0, return_inverse=True)
    for i, key in enumerate(keys.tolist()):
        members = np.flatnonzero(member_of.ravel() == i)
        yield tuple(key), _blocks(members if rows is None else rows[members], chunks[members])


def _blocks(members: NDArray[np.int64], chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    last = np.cumsum(chunks)
    within = np.arange(last[-1]) - np.repeat(last - chunks, chunks)
    return np.repeat(members, chunks) | within << 32


# ---- to the device


@contextmanager
def working_on(gpu: int, stream: int | None) -> Iterator[torch.device]:
    """Make a GPU and a stream torch's current ones, which are Triton's too."""
    if INTERPRETED.value:
        yield torch.device("cpu")
        return
    with torch.cuda.device(gpu):
        if stream in (None, torch.cuda.current_stream().cuda_stream):
            yield torch.device("cuda", gpu)
        else:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=gpu)):
                yield torch.device("cuda", gpu)


def send(words: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy of the words in device memory, in the order of torch's current stream."""
    if device.type == "cpu":
        return torch.from_numpy(words)
    if not torch.cuda.is_current_stream_capturing():
        return _pinned(words).to(device, non_blocking=True)  # torch reuses it once it is copied
    with _relaxed_capture():
        _captured.append(_pinned(words))
    return _captured[-1].to(device, non_blocking=True)


def _pinned(words: NDArray[np.int64]) -> torch.Tensor:
    pinned = torch.empty(words.size, dtype=torch.int64, pin_memory=True)
    pinned.numpy()[:] = words
    return pinned


@contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Let this thread allocate pinned memory while a stream is being captured."""
    driver = ctypes.CDLL("libcuda.so.1")
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; exchanged for the thread's own
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


# ---- in a kernel


@triton.jit
def find_chunk(table, block_at, ROW_WORDS: tl.constexpr):
    """Where this thread block's row stands in the table, and which of its chunks is meant."""
    block = tl.load(table + block_at + tl.program_id(0))
    return table + (block & 0xFFFFFFFF) * ROW_WORDS, block >> 32
