"""AdamW on a GPU by Triton: the formula of ``csrc/math/adamw.h`` over a tensor table.

    g <- ± g / grad_scale                    (maximize, loss scaling)
    m <- b1 m + (1 - b1) g                   v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr wd) - lr/c1 * m / (sqrt(v)/sqrt(c2) + eps),   c_i = 1 - b_i^step
    amsgrad: the root is taken of u <- max(u, v) instead

28 bytes per element in fp32, 22 with bf16 parameters and gradients, 14 in bf16 (amsgrad: 36, 30,
18), against one division and one square root: memory-bound. Operations, their order and their
roundings are those of the C++ formula, so that all backends give the same bits.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fusedopt.triton_kernels import _table
from fusedopt.triton_kernels._adam import (
    FROM_GRAD,
    SCALAR_WORDS,
    SKIP,
    first_moment,
    scalars_of,
)
from fusedopt.triton_kernels._storage import (
    ABSENT,
    FLOAT64,
    LAUNCH_OPTIONS,
    divide,
    load,
    maximum,
    pointer,
    size_of,
    square_root,
    store,
)
from fusedopt.triton_kernels._table import CHUNK, SINGLE, SPAN, STRIDED, VECTOR, find_chunk

NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
ROLES = len(NAMES)
THREADS = 128

# A row of the table: the roles' addresses, then these.
NUMEL, HEAD, SCALARS, LAYOUT, ROW_WORDS = (tl.constexpr(ROLES + i) for i in range(5))


# ---- the step


@triton.jit
def adamw_tile(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
    at_param, at_grad, at_exp_avg, at_exp_avg_sq, at_max_exp_avg_sq,
    mask,
    lerp_weight, beta2, eps, grad_weight, decay, rate, inv_sqrt_c2, grad_factor, from_grad,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MAX_EXP_AVG_SQ: tl.constexpr,
):  # fmt: skip
    """Update the elements at these places, counted from the roles' pointers."""
    S: tl.constexpr = decay.dtype
    p = load(param, at_param, mask, PARAM, S)
    g = load(grad, at_grad, mask, GRAD, S)
    m = load(exp_avg, at_exp_avg, mask, EXP_AVG, S)
    v = load(exp_avg_sq, at_exp_avg_sq, mask, EXP_AVG_SQ, S)

    m = first_moment(g, m, lerp_weight, grad_factor, from_grad)
    v = tl.fma(beta2, v, (grad_weight * g) * g)  # in this order: g * g may overflow
    if MAX_EXP_AVG_SQ == ABSENT:
        u = v
    else:
        u = maximum(load(max_exp_avg_sq, at_max_exp_avg_sq, mask, MAX_EXP_AVG_SQ, S), v)
        store(max_exp_avg_sq, at_max_exp_avg_sq, mask, u, MAX_EXP_AVG_SQ)
    p = tl.fma(rate, divide(m, tl.fma(square_root(u), inv_sqrt_c2, eps)), p * decay)

    store(param, at_param, mask, p, PARAM)
    store(exp_avg, at_exp_avg, mask, m, EXP_AVG)
    store(exp_avg_sq, at_exp_avg_sq, mask, v, EXP_AVG_SQ)


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def adamw_kernel(
    table,  # int64
    all_scalars,  # float64
    block_at,
    layouts_at,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MAX_EXP_AVG_SQ: tl.constexpr,
    ACCESS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One chunk of a row, see `_table`."""
    row, chunk = find_chunk(table, block_at, ROW_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        lerp_weight = tl.load(scalars + 0).to(S)
        beta2 = tl.load(scalars + 1).to(S)
        eps = tl.load(scalars + 2).to(S)
        grad_weight = tl.load(scalars + 3).to(S)
        decay = tl.load(scalars + 4).to(S)
        rate = tl.load(scalars + 5).to(S)
        inv_sqrt_c2 = tl.load(scalars + 6).to(S)
        grad_factor = tl.load(scalars + 7).to(S)
        from_grad = tl.load(scalars + FROM_GRAD) != 0

        head = tl.load(row + HEAD)
        begin = chunk * CHUNK + head
        count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
        first = tl.where(ACCESS == STRIDED, 0, begin)
        ALIGNED: tl.constexpr = ACCESS == VECTOR
        param = pointer(tl.load(row) + first * size_of(PARAM), PARAM, ALIGNED)
        grad = pointer(tl.load(row + 1) + first * size_of(GRAD), GRAD, ALIGNED)
        exp_avg = pointer(tl.load(row + 2) + first * size_of(EXP_AVG), EXP_AVG, ALIGNED)
        exp_avg_sq = pointer(tl.load(row + 3) + first * size_of(EXP_AVG_SQ), EXP_AVG_SQ, ALIGNED)
        max_exp_avg_sq = param
        if MAX_EXP_AVG_SQ != ABSENT:
            max_exp_avg_sq = pointer(
                tl.load(row + 4) + first * size_of(MAX_EXP_AVG_SQ), MAX_EXP_AVG_SQ, ALIGNED
            )
        end = count
        if ALIGNED:
            end = count // SPAN * SPAN
        for i in range(0, end, TILE):
            at = i + tl.arange(0, TILE)
            if ACCESS == STRIDED:
                layout = table + layouts_at + tl.load(row + LAYOUT)
                at_p, at_g, at_m, at_v, at_u = strided(layout, begin + at)
                adamw_tile(
                    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
                    at_p, at_g, at_m, at_v, at_u, at < end,
                    lerp_weight, beta2, eps, grad_weight, decay, rate, inv_sqrt_c2, grad_factor,
                    from_grad,
                    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ,
                )  # fmt: skip
            else:
                adamw_tile(
                    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
                    at, at, at, at, at, at < end,
                    lerp_weight, beta2, eps, grad_weight, decay, rate, inv_sqrt_c2, grad_factor,
                    from_grad,
                    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ,
                )  # fmt: skip
        if ALIGNED:  # what is left at both ends, fewer than SPAN elements each
            lead = tl.where(chunk == 0, head, 0).to(tl.int32)
            edges = lead + count - end
            if edges > 0:
                edge = tl.arange(0, 2 * SPAN)
                at = tl.where(edge < lead, edge, end + edge) - lead
                adamw_tile(
                    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
                    at, at, at, at, at, edge < edges,
                    lerp_weight, beta2, eps, grad_weight, decay, rate, inv_sqrt_c2, grad_factor,
                    from_grad,
                    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ,
                )  # fmt: skip


@triton.jit
def strided(layout, rest):
    """Where elements, numbered in the row's own order, stand in each role."""
    ndim = tl.load(layout).to(tl.int32)
    at_p = tl.zeros_like(rest)
    at_g = at_p
    at_m = at_p
    at_v = at_p
    at_u = at_p
    for d in range(0, ndim):
        axis = layout + ndim - d  # its size; its strides follow, ndim words apart
        size = tl.load(axis)
        index = rest % size
        rest = rest // size
        at_p += index * tl.load(axis + ndim)
        at_g += index * tl.load(axis + 2 * ndim)
        at_m += index * tl.load(axis + 3 * ndim)
        at_v += index * tl.load(axis + 4 * ndim)
        at_u += index * tl.load(axis + 5 * ndim)
    return at_p, at_g, at_m, at_v, at_u


# ---- launching


def launch(
    rows: NDArray[np.int64],
    layouts: NDArray[np.int64],
    *numbers: NDArray[Any],
    gpu: int = 0,
    stream: int | None = None,
) -> None:
    """One step over packed rows, without waiting for the device.

    Args:
        rows, layouts: as ``packed()`` of a plan gives them.
        numbers: the rows' scalars; or options, counters and loss scale, where some of these lie on
            the device: then it counts the step first, and if found_inf holds anything but 0,
            counters and arrays stay as they are.
        gpu, stream: where, if not in the interpreter.

    Raises:
        ValueError: an array lies where a GPU can't access it. Nothing is written.
    """
    _table.check_alignment(rows, NAMES)
    table = _table.pack(rows, layouts, ROLES, numbers)
    with _table.working_on(gpu, stream) as device:
        words = _table.send(table.words, device)
        scalars = scalars_of(words, table.more_at, [part.size for part in numbers], device)
        launch_rows(table, words, scalars)


def launch_rows(table: _table.Table, words: torch.Tensor, scalars: torch.Tensor) -> None:
    for one in table.launches:
        adamw_kernel[(one.thread_blocks,)](
            words, scalars, one.block_at, table.layouts_at, *one.kind.dtypes, one.kind.access,
            tile_of(one.kind), num_warps=THREADS // 32, **LAUNCH_OPTIONS,
        )  # fmt: skip


def tile_of(kind: _table.Kind) -> int:
    """Elements at a time: 32 bytes a thread of each role, in the precision of the arithmetic.

    Less where accesses of single elements and places by strides take registers.
    """
    wide = 8 if kind.dtypes[0] == FLOAT64.value else 4
    each = {VECTOR.value: 32 // wide, SINGLE.value: 16 // wide, STRIDED.value: 1}[kind.access]
    return THREADS * each
