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
from fusedopt.triton_kernels._numbers import bias_correction, increment_kernel, is_set, read_number
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
# A row's scalars, float64: the first eight of C++'s AdamWScalars, then these.
FROM_GRAD, SKIP, SCALAR_WORDS = (tl.constexpr(8 + i) for i in range(3))


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

    difference = tl.fma(grad_factor, g, -m)
    m = tl.fma(lerp_weight, difference, tl.where(from_grad, grad_factor * g, m))
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


# ---- numbers on the device

# A record of options; doubles, then what replaces them where it lies on the device.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE, HOST_STEP = (tl.constexpr(i) for i in range(7))
LR_NUMBER, DECAY_NUMBER, STEP_NUMBER, OPTION_WORDS = (tl.constexpr(7 + 2 * i) for i in range(4))
# What all rows share: 1 / grad_scale as a double, then what replaces it, then found_inf.
GRAD_SCALE, FOUND_INF = (tl.constexpr(1 + 2 * i) for i in range(2))


@triton.jit
def double(word):
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["options_at", "loss_scale_at"])
def prepare_kernel(table, options_at, loss_scale_at, all_scalars):
    """`adamw_scalars` of C++ for one record of options; one thread block a record."""
    i = tl.program_id(0).to(tl.int64)
    options = table + options_at + i * OPTION_WORDS
    loss_scale = table + loss_scale_at
    lr = read_number(options + LR_NUMBER, double(options + LR))
    weight_decay = read_number(options + DECAY_NUMBER, double(options + WEIGHT_DECAY))
    counted = read_number(options + STEP_NUMBER, tl.load(options + HOST_STEP).to(tl.float64))
    inv_grad_scale = double(loss_scale)
    if tl.load(loss_scale + GRAD_SCALE) != 0:
        inv_grad_scale = 1 / read_number(loss_scale + GRAD_SCALE, inv_grad_scale)
    beta1 = double(options + BETA1)
    beta2 = double(options + BETA2)
    step = counted.to(tl.int64)
    from_grad = beta1 < 0.5
    scalars = all_scalars + i * SCALAR_WORDS
    tl.store(scalars + 0, tl.where(from_grad, -beta1, 1 - beta1))
    tl.store(scalars + 1, beta2)
    tl.store(scalars + 2, double(options + EPS))
    tl.store(scalars + 3, (1 - beta2) * inv_grad_scale * inv_grad_scale)
    tl.store(scalars + 4, 1 - lr * weight_decay)
    tl.store(scalars + 5, -lr / bias_correction(beta1, step))
    tl.store(scalars + 6, 1 / tl.sqrt(bias_correction(beta2, step)))
    maximize = tl.load(options + MAXIMIZE) != 0
    tl.store(scalars + 7, tl.where(maximize, -inv_grad_scale, inv_grad_scale))
    tl.store(scalars + FROM_GRAD, from_grad.to(tl.float64))
    tl.store(scalars + SKIP, is_set(loss_scale + FOUND_INF).to(tl.float64))


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
        if len(numbers) == 1:
            scalars = words[table.more_at[0] :].view(torch.float64)
        else:
            sizes = [part.size for part in numbers]
            scalars = _prepare(words, table.more_at, sizes, device)
        _launch_rows(table, words, scalars)


def _prepare(
    words: torch.Tensor, at: list[int], sizes: list[int], device: torch.device
) -> torch.Tensor:
    """Count the step, and compute the rows' scalars on the device."""
    options_at, counters_at, loss_scale_at = at
    if counters := sizes[1] // 2:
        found_inf_at = loss_scale_at + FOUND_INF.value
        increment_kernel[(counters,)](
            words, counters_at, found_inf_at, num_warps=1, **LAUNCH_OPTIONS
        )
    options = sizes[0] // OPTION_WORDS.value
    scalars = torch.empty(options * SCALAR_WORDS.value, dtype=torch.float64, device=device)
    if options:
        prepare_kernel[(options,)](
            words, options_at, loss_scale_at, scalars, num_warps=1, **LAUNCH_OPTIONS
        )
    return scalars


def _launch_rows(table: _table.Table, words: torch.Tensor, scalars: torch.Tensor) -> None:
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
