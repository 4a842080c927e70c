"""Blockwise Adam on a GPU by Triton: the formula of ``csrc/math/blockwise_adam.h``.

    g <- ± g / grad_scale                    (maximize, loss scaling)
    m <- b1 m + (1 - b1) g                   v_b <- b2 v_b + (1 - b2) mean over b of g^2
    p <- p (1 - lr wd) - lr/c1 * m / (sqrt(v_b)/sqrt(c2) + eps),   c_i = 1 - b_i^step

20 bytes per element in fp32, 10 in bf16, where a block's gradient stays in registers; 24 and 12
where it is read twice. Two conversions and two operations in double an element: memory-bound.
Sums have one order, which follows from a region's shape alone. Blocks of one coordinate are AdamW.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fusedopt.triton_kernels import _regions, _table, adamw
from fusedopt.triton_kernels._adam import (
    BETA2,
    DECAY,
    EPS,
    FROM_GRAD,
    GRAD_FACTOR,
    GRAD_WEIGHT,
    INV_SQRT_C2,
    LERP_WEIGHT,
    RATE,
    SCALAR_WORDS,
    SKIP,
    first_moment,
    scalars_of,
)
from fusedopt.triton_kernels._regions import (
    COLUMNS,
    COUNT,
    GROUP,
    LAYERS,
    LAYOUT,
    OFFSET,
    PART_GROUP,
    PARTS,
    PARTS_TILE,
    PIECE,
    RATES,
    RATES_TILE,
    REGION_WORDS,
    ROWS,
    SCALARS,
    STRIDE,
    SUMS,
    WIDTH,
)
from fusedopt.triton_kernels._storage import (
    ABSENT,
    FLOAT32,
    FLOAT64,
    LAUNCH_OPTIONS,
    load,
    pointer,
    store,
)
from fusedopt.triton_kernels._table import CHUNK, SPAN, STRIDED, VECTOR, find_chunk

NAMES = ("params", "grads", "exp_avgs", "block_sqs")
THREADS = 256
TILE = tl.constexpr(2048)  # elements at a time in two passes
STRIDED_TILE = tl.constexpr(1024)


# ---- what all kernels share


@triton.jit
def find_places(table, layouts_at, row, at, ACCESS: tl.constexpr):
    """Where elements, counted from the region's first, stand in each role."""
    at_p = at
    at_g = at
    at_m = at
    if ACCESS == STRIDED:
        layout = table + layouts_at + tl.load(row + LAYOUT)
        ndim = tl.load(layout).to(tl.int32)
        rest = at + tl.load(row + OFFSET)
        at_p = tl.zeros_like(rest)
        at_g = at_p
        at_m = at_p
        for d in range(0, ndim):
            axis = layout + ndim - d  # its size; its strides follow, ndim words apart
            size = tl.load(axis)
            index = rest % size
            rest = rest // size
            at_p += index * tl.load(axis + ndim)
            at_g += index * tl.load(axis + 2 * ndim)
            at_m += index * tl.load(axis + 3 * ndim)
    return at_p, at_g, at_m


@triton.jit
def even(number, ACCESS: tl.constexpr):
    """A number of elements that, for accesses by vectors, the compiler sees to keep alignment."""
    if ACCESS == VECTOR:
        number = number // SPAN * SPAN
    return number


@triton.jit
def block_rate(block_sq, block, mask, total, count, scalars):
    """Update v_b; what m is to be multiplied by."""
    v = tl.load(block_sq + block, mask=mask, other=0).to(tl.float64)
    weight = tl.load(scalars + GRAD_WEIGHT) / tl.maximum(count, 1).to(tl.float64)
    v = tl.fma(tl.load(scalars + BETA2), v, weight * total)
    tl.store(block_sq + block, v.to(tl.float32), mask=mask)
    root = tl.fma(tl.sqrt(v), tl.load(scalars + INV_SQRT_C2), tl.load(scalars + EPS))
    return tl.load(scalars + RATE) / root


@triton.jit
def step_tile(
    param, exp_avg, at_p, at_m, mask, p, g, m, rate, scalars,
    PARAM: tl.constexpr, EXP_AVG: tl.constexpr,
):  # fmt: skip
    lerp_weight = tl.load(scalars + LERP_WEIGHT).to(p.dtype)
    grad_factor = tl.load(scalars + GRAD_FACTOR).to(p.dtype)
    decay = tl.load(scalars + DECAY).to(p.dtype)
    m = first_moment(g, m, lerp_weight, grad_factor, tl.load(scalars + FROM_GRAD) != 0)
    store(param, at_p, mask, tl.fma(rate, m, p * decay), PARAM)
    store(exp_avg, at_m, mask, m, EXP_AVG)


@triton.jit
def squares(g, mask):
    wide = tl.where(mask, g.to(tl.float64), 0)
    return wide * wide


# ---- blocks of one coordinate in tensors with strides


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def coordinates_kernel(
    table, all_scalars, block_at, layouts_at,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr,
    ACCESS: tl.constexpr,
    COORDINATES: tl.constexpr,
):  # fmt: skip
    """AdamW on one chunk of a region."""
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        param = pointer(tl.load(row), PARAM, False)
        begin = chunk * CHUNK
        end = tl.minimum(tl.load(row + COLUMNS), begin + CHUNK)
        for i in range(0, (end - begin).to(tl.int32), COORDINATES):
            at = begin + i + tl.arange(0, COORDINATES)
            at_p, at_g, at_m = find_places(table, layouts_at, row, at, ACCESS)
            adamw.adamw_tile(
                param, pointer(tl.load(row + 1), GRAD, False),
                pointer(tl.load(row + 2), EXP_AVG, False),
                pointer(tl.load(row + 3), FLOAT32, False), param,
                at_p, at_g, at_m, at, at, at < end,
                tl.load(scalars + LERP_WEIGHT).to(S), tl.load(scalars + BETA2).to(S),
                tl.load(scalars + EPS).to(S), tl.load(scalars + GRAD_WEIGHT).to(S),
                tl.load(scalars + DECAY).to(S), tl.load(scalars + RATE).to(S),
                tl.load(scalars + INV_SQRT_C2).to(S), tl.load(scalars + GRAD_FACTOR).to(S),
                tl.load(scalars + FROM_GRAD) != 0,
                PARAM, GRAD, EXP_AVG, FLOAT32, ABSENT,
            )  # fmt: skip


# ---- one pass


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def one_pass_kernel(
    table, all_scalars, block_at, layouts_at,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr,
    ACCESS: tl.constexpr,
    SPACE: tl.constexpr,  # of a block, a power of two
    BLOCKS: tl.constexpr,  # of a tile
):  # fmt: skip
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        param = pointer(tl.load(row), PARAM, ACCESS == VECTOR)
        grad = pointer(tl.load(row + 1), GRAD, ACCESS == VECTOR)
        exp_avg = pointer(tl.load(row + 2), EXP_AVG, ACCESS == VECTOR)
        columns = even(tl.load(row + COLUMNS), ACCESS)
        group = even(tl.load(row + GROUP), ACCESS)
        block = chunk * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        within = tl.arange(0, SPACE)[None, :]
        at = block * group + within
        mask = (within < group) & (at < columns)
        at_p, at_g, at_m = find_places(table, layouts_at, row, at, ACCESS)
        g = load(grad, at_g, mask, GRAD, S)
        p = load(param, at_p, mask, PARAM, S)
        m = load(exp_avg, at_m, mask, EXP_AVG, S)
        total = tl.sum(squares(g, mask), axis=1)[:, None]
        left = columns - block * group
        block_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        rate = block_rate(block_sq, block, left > 0, total, tl.minimum(left, group), scalars)
        step_tile(param, exp_avg, at_p, at_m, mask, p, g, m, rate.to(S), scalars, PARAM, EXP_AVG)


# ---- two passes


@triton.jit
def find_tile(row, chunk, ACCESS: tl.constexpr, STRIP: tl.constexpr):
    """Where a tile begins and ends: rows, columns, and its block if it is a piece of one."""
    columns = even(tl.load(row + COLUMNS), ACCESS)
    if STRIP == 0:
        group = even(tl.load(row + GROUP), ACCESS)
        pieces = tl.load(row + PART_GROUP)
        block = chunk // pieces
        column = block * group + chunk % pieces * PIECE
        end = tl.minimum(tl.minimum((block + 1) * group, columns), column + PIECE)
        return tl.zeros_like(chunk), tl.zeros_like(chunk) + 1, column, even(end, ACCESS), block
    else:
        strips = tl.cdiv(columns, STRIP)
        first = chunk // strips * (PIECE // STRIP)
        last = tl.minimum(tl.load(row + ROWS), first + PIECE // STRIP)
        return first, last, chunk % strips * STRIP, columns, tl.zeros_like(chunk)


@triton.jit
def steps_of(first, last, column, end, STRIP: tl.constexpr, SIZE: tl.constexpr):
    """How often a tile is as high, or long, as what is worked on at a time."""
    if STRIP == 0:
        steps = tl.cdiv(tl.maximum(end - column, 0), SIZE)
    else:
        steps = tl.cdiv(last - first, SIZE // STRIP)
    return steps.to(tl.int32)


@triton.jit
def elements_of_step(
    row, i, first, last, column, end, ACCESS: tl.constexpr, STRIP: tl.constexpr, SIZE: tl.constexpr
):
    """The elements, counted from the region's first, and which of them are the tile's."""
    if STRIP == 0:
        at = column + i * SIZE + tl.arange(0, SIZE)[None, :]
        mask = at < end
    else:
        rows = first + i * (SIZE // STRIP) + tl.arange(0, SIZE // STRIP)[:, None]
        columns = column + tl.arange(0, STRIP)[None, :]
        at = rows * even(tl.load(row + STRIDE), ACCESS) + columns
        mask = (rows < last) & (columns < end)
    return at, mask


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def squares_kernel(
    table, all_scalars, values, block_at, layouts_at,
    GRAD: tl.constexpr,
    ACCESS: tl.constexpr,
    STRIP: tl.constexpr,  # columns, or 0: a piece of a block
    SIZE: tl.constexpr,
):  # fmt: skip
    """A tile's parts of its blocks' sums."""
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if GRAD == FLOAT64 else tl.float32
        grad = pointer(tl.load(row + 1), GRAD, ACCESS == VECTOR)
        first, last, column, end, _block = find_tile(row, chunk, ACCESS, STRIP)
        WIDE: tl.constexpr = SIZE if STRIP == 0 else STRIP
        total = tl.zeros([SIZE // WIDE, WIDE], tl.float64)
        for i in range(0, steps_of(first, last, column, end, STRIP, SIZE)):
            at, mask = elements_of_step(row, i, first, last, column, end, ACCESS, STRIP, SIZE)
            _at_p, at_g, _at_m = find_places(table, layouts_at, row, at, ACCESS)
            total += squares(load(grad, at_g, mask, GRAD, S, ""), mask)
        parts = values + tl.load(row + PARTS)
        if STRIP == 0:
            tl.store(parts + chunk, tl.sum(tl.sum(total, axis=1), axis=0))
        else:
            layer = chunk // tl.cdiv(end, STRIP)
            columns = column + tl.arange(0, STRIP)
            tl.store(parts + layer * end + columns, tl.sum(total, axis=0), mask=columns < end)


@triton.jit(do_not_specialize=["block_at"])
def sums_kernel(
    table, values, block_at,
    LANES: tl.constexpr,  # of each block
):  # fmt: skip
    """Adds up the parts of some blocks."""
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    width = tl.load(row + WIDTH)
    group = tl.load(row + PART_GROUP)
    count = tl.load(row + LAYERS) * group
    parts = values + tl.load(row + PARTS)
    BLOCKS: tl.constexpr = PARTS_TILE // LANES
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    total = tl.zeros([BLOCKS, LANES], tl.float64)
    for i in range(0, tl.cdiv(count, LANES).to(tl.int32)):
        part = i * LANES + tl.arange(0, LANES)[None, :]
        column = block * group + part % group
        mask = (part < count) & (column < width)
        total += tl.load(parts + part // group * width + column, mask=mask, other=0)
    blocks = chunk * BLOCKS + tl.arange(0, BLOCKS)
    sums = values + tl.load(row + SUMS)
    tl.store(sums + blocks, tl.sum(total, axis=1), mask=blocks * group < width)


@triton.jit(do_not_specialize=["block_at"])
def rates_kernel(table, all_scalars, values, block_at):
    """From sums to second moments and rates."""
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        group = tl.load(row + GROUP)
        block = chunk * RATES_TILE + tl.arange(0, RATES_TILE)
        left = tl.load(row + COLUMNS) - block * group
        together = tl.load(row + COUNT)
        count = tl.where(together > 0, together, tl.load(row + ROWS) * tl.minimum(left, group))
        mask = left > 0
        total = tl.load(values + tl.load(row + SUMS) + block, mask=mask, other=0)
        block_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        rate = block_rate(block_sq, block, mask, total, count, scalars)
        tl.store(values + tl.load(row + RATES) + block, rate, mask=mask)


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def update_kernel(
    table, all_scalars, values, block_at, layouts_at,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr,
    ACCESS: tl.constexpr,
    STRIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A tile's first moments and parameters."""
    row, chunk = find_chunk(table, block_at, REGION_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        param = pointer(tl.load(row), PARAM, ACCESS == VECTOR)
        grad = pointer(tl.load(row + 1), GRAD, ACCESS == VECTOR)
        exp_avg = pointer(tl.load(row + 2), EXP_AVG, ACCESS == VECTOR)
        rates = values + tl.load(row + RATES)
        first, last, column, end, block = find_tile(row, chunk, ACCESS, STRIP)
        if STRIP == 0:
            rate = tl.load(rates + block).to(S)
        else:
            columns = column + tl.arange(0, STRIP)[None, :]
            rate = tl.load(rates + columns // tl.load(row + GROUP), mask=columns < end, other=0)
            rate = rate.to(S)
        for i in range(0, steps_of(first, last, column, end, STRIP, SIZE)):
            at, mask = elements_of_step(row, i, first, last, column, end, ACCESS, STRIP, SIZE)
            at_p, at_g, at_m = find_places(table, layouts_at, row, at, ACCESS)
            p = load(param, at_p, mask, PARAM, S)
            g = load(grad, at_g, mask, GRAD, S)
            m = load(exp_avg, at_m, mask, EXP_AVG, S)
            step_tile(param, exp_avg, at_p, at_m, mask, p, g, m, rate, scalars, PARAM, EXP_AVG)


@triton.jit(do_not_specialize=["copies_at"])
def copy_kernel(table, all_scalars, copies_at):
    """A value that a tensor without a gradient holds; one thread block each."""
    pair = table + copies_at + 2 * tl.program_id(0)
    if tl.load(all_scalars + SKIP) == 0:
        value = tl.load(tl.load(pair + 1).to(tl.pointer_type(tl.float32)))
        tl.store(tl.load(pair).to(tl.pointer_type(tl.float32)), value)


# ---- launching


def launch(
    regions: NDArray[np.int64],
    copies: NDArray[np.int64],
    rows: NDArray[np.int64],
    layouts: NDArray[np.int64],
    *numbers: NDArray[Any],
    gpu: int = 0,
    stream: int | None = None,
) -> None:
    """One step over packed rows and their regions, without waiting for the device.

    Args:
        regions, copies, rows, layouts: as ``packed()`` of a plan gives them.
        numbers, gpu, stream: as in ``adamw.launch``.

    Raises:
        ValueError: an array lies where a GPU can't access it. Nothing is written.
    """
    _table.check_alignment(rows, NAMES)
    table = _regions.pack(regions, copies, rows, layouts, numbers)
    elements = _table.pack(table.elements, layouts[:0], adamw.ROLES, [])
    with _table.working_on(gpu, stream) as device:
        words = _table.send(table.words, device)
        scalars = scalars_of(words, table.more_at, [part.size for part in numbers], device)
        if elements.launches:
            adamw.launch_rows(elements, _table.send(elements.words, device), scalars)
        values = torch.empty(table.workspace, dtype=torch.float64, device=device)
        _launch_stages(table, words, scalars, values)


def _launch_stages(
    table: _regions.Table, words: torch.Tensor, scalars: torch.Tensor, values: torch.Tensor
) -> None:
    arguments = {
        "coordinates": (coordinates_kernel, (words, scalars)),
        "one_pass": (one_pass_kernel, (words, scalars)),
        "squares": (squares_kernel, (words, scalars, values)),
        "sums": (sums_kernel, (words, values)),
        "rates": (rates_kernel, (words, scalars, values)),
        "update": (update_kernel, (words, scalars, values)),
    }
    for stage, (kernel, tensors) in arguments.items():
        for one in table.stages.get(stage, ()):
            at = [one.block_at, table.layouts_at][: 1 if stage in ("sums", "rates") else 2]
            constants, threads = constants_of(stage, one.key)
            kernel[(one.thread_blocks,)](
                *tensors, *at, *constants, num_warps=threads // 32, **LAUNCH_OPTIONS
            )
    if table.copies:
        copy_kernel[(table.copies,)](words, scalars, table.copies_at, num_warps=1, **LAUNCH_OPTIONS)


def constants_of(stage: str, key: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """A kernel's constants and its threads, from the key of its regions."""
    if stage == "coordinates":
        return (*key, adamw.THREADS), adamw.THREADS
    if stage == "one_pass":
        *kind, access, space = key
        tile = int(_regions.tile_elements(kind[0], access, space))
        each = 4 if access == STRIDED.value else 16 if space == _regions.ONE_PASS else 8
        return (*kind, access, space, tile // space), tile // each
    if stage in ("squares", "update"):
        tile = STRIDED_TILE if key[-2] == STRIDED.value else TILE
        return (*key, tile.value), THREADS
    return (key if stage == "sums" else ()), RATES_TILE.value
