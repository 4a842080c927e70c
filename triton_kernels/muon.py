"""Muon and NorMuon on a GPU by Triton: the formulas of ``csrc/math/muon.h`` around Newton–Schulz.

    g <- ± g / grad_scale                    (maximize, loss scaling)
    m <- mu m + (1 - mu) g                   u = mu m + (1 - mu) g (with Nesterov's), else m
    sum form: m <- mu m + g, u = mu m + g
    o = Newton-Schulz(u)
    NorMuon, for every row i of the r x c matrix:
      v_i <- b2 v_i + (1 - b2) mean(o_i^2)   o_i <- s o_i / (sqrt(v_i) + 1e-10)
      with s such that |o| stays
    p <- p (1 - lr wd) - lr a(r, c) o        cautious: only where o p >= 0 does p decay

Beside the products 28 bytes per element in fp32 (20 with bf16 storage); NorMuon reads o once more.
Matrices go through a step in waves of 2^26 elements, or one larger matrix.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fusedopt._newton_schulz_schedule import Schedule
from fusedopt.triton_kernels import _table, newton_schulz
from fusedopt.triton_kernels._adam import double
from fusedopt.triton_kernels._numbers import is_set, read_number
from fusedopt.triton_kernels._storage import (
    FLOAT32,
    FLOAT64,
    LAUNCH_OPTIONS,
    load,
    pointer,
    store,
)
from fusedopt.triton_kernels._table import CHUNK, SPAN, STRIDED, VECTOR, VECTOR_BYTES, find_chunk

Ints = NDArray[np.int64]

NAMES = ("params", "grads", "momentum_buffers", "row_sqs")
ROLES = 3  # with elements
WAVE = 1 << 26  # elements
TILE = 1024
THREADS = 128
ROW_TILE, LINE_TILE = (tl.constexpr(n) for n in (1024, 64))  # of a line's elements; lines at a time
ALL_LINES = tl.constexpr(1024)

# Columns of the matrices that `launch` is given.
ROW, OFFSET, HEIGHT, WIDTH, STRIDE, BY_COLUMN, FIRST_LINE, SCALE, GIVEN_WORDS = range(9)
# A matrix in the table: the roles' addresses, then these.
(
    ROW_SQ, VALUES, LINES, SCALARS_AT, LAYOUT_AT, OFFSET_AT, HEIGHT_AT, WIDTH_AT, STRIDE_AT,
    SCALE_AT, KEEP, MATRIX_WORDS,
) = (tl.constexpr(ROLES + i) for i in range(12))  # fmt: skip
# A tensor's scalars, float64.
(
    LERP_WEIGHT, MOMENTUM, GRAD_FACTOR, DECAY, FROM_GRAD, NESTEROV, SUM_FORM, CAUTIOUS, BETA2,
    RATE, SKIP, SCALAR_WORDS,
) = (tl.constexpr(i) for i in range(12))  # fmt: skip
# Options as they are sent: four doubles, four flags, and what replaces the first three.
(
    LR_OPTION, DECAY_OPTION, MOMENTUM_OPTION, BETA2_OPTION,
    NESTEROV_OPTION, SUM_OPTION, MAXIMIZE_OPTION, CAUTIOUS_OPTION,
) = (tl.constexpr(i) for i in range(8))  # fmt: skip
LR_NUMBER, DECAY_NUMBER, MOMENTUM_NUMBER, OPTION_WORDS = (tl.constexpr(8 + 2 * i) for i in range(4))
GRAD_SCALE, FOUND_INF = (tl.constexpr(1 + 2 * i) for i in range(2))  # after 1 / grad_scale


@triton.jit(do_not_specialize=["options_at", "scale_at"])
def prepare_kernel(table, options_at, scale_at, all_scalars):
    """`muon_scalars` of C++ for one record of options; one thread block a record."""
    i = tl.program_id(0).to(tl.int64)
    options = table + options_at + i * OPTION_WORDS
    loss_scale = table + scale_at
    lr = read_number(options + LR_NUMBER, double(options + LR_OPTION))
    weight_decay = read_number(options + DECAY_NUMBER, double(options + DECAY_OPTION))
    momentum = read_number(options + MOMENTUM_NUMBER, double(options + MOMENTUM_OPTION))
    inv_grad_scale = double(loss_scale)
    if tl.load(loss_scale + GRAD_SCALE) != 0:
        inv_grad_scale = 1 / read_number(loss_scale + GRAD_SCALE, inv_grad_scale)
    from_grad = momentum < 0.5
    maximize = tl.load(options + MAXIMIZE_OPTION) != 0
    scalars = all_scalars + i * SCALAR_WORDS
    tl.store(scalars + LERP_WEIGHT, tl.where(from_grad, -momentum, 1 - momentum))
    tl.store(scalars + MOMENTUM, momentum)
    tl.store(scalars + GRAD_FACTOR, tl.where(maximize, -inv_grad_scale, inv_grad_scale))
    tl.store(scalars + DECAY, 1 - lr * weight_decay)
    tl.store(scalars + FROM_GRAD, from_grad.to(tl.float64))
    tl.store(scalars + NESTEROV, tl.load(options + NESTEROV_OPTION).to(tl.float64))
    tl.store(scalars + SUM_FORM, tl.load(options + SUM_OPTION).to(tl.float64))
    tl.store(scalars + CAUTIOUS, tl.load(options + CAUTIOUS_OPTION).to(tl.float64))
    tl.store(scalars + BETA2, double(options + BETA2_OPTION))
    tl.store(scalars + RATE, -lr)
    tl.store(scalars + SKIP, is_set(loss_scale + FOUND_INF).to(tl.float64))


# ---- element by element


@triton.jit
def places(table, layouts_at, row, i, ACCESS: tl.constexpr):
    """Where a matrix's elements stand in the parameter, the gradient and the momentum."""
    if ACCESS == VECTOR:  # one row after the other
        return i, i, i
    else:
        width = tl.load(row + WIDTH_AT)
        at = tl.load(row + OFFSET_AT) + i // width * tl.load(row + STRIDE_AT) + i % width
        if ACCESS == STRIDED:
            layout = table + layouts_at + tl.load(row + LAYOUT_AT)
            return strided(layout, at)
        else:
            return at, at, at


@triton.jit
def strided(layout, rest):
    ndim = tl.load(layout).to(tl.int32)
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
def count_of(row, begin, ACCESS: tl.constexpr):
    """How many of a chunk's elements there are."""
    count = tl.load(row + HEIGHT_AT) * tl.load(row + WIDTH_AT) - begin
    if ACCESS == VECTOR:
        count = count // SPAN * SPAN  # as it is, but the compiler is to see it
    return tl.minimum(count, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def before_kernel(
    table, all_scalars, block_at, layouts_at,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM_BUFFER: tl.constexpr,
    ACCESS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Momentum, and what is to be orthogonalised, of one chunk of a matrix."""
    row, chunk = find_chunk(table, block_at, MATRIX_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS_AT) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        WIDE: tl.constexpr = FLOAT64 if PARAM == FLOAT64 else FLOAT32
        grad = pointer(tl.load(row + 1), GRAD, ACCESS == VECTOR)
        momentum_buffer = pointer(tl.load(row + 2), MOMENTUM_BUFFER, ACCESS == VECTOR)
        values = pointer(tl.load(row + VALUES), WIDE, True)
        weight = tl.load(scalars + LERP_WEIGHT).to(S)
        momentum = tl.load(scalars + MOMENTUM).to(S)
        factor = tl.load(scalars + GRAD_FACTOR).to(S)
        from_grad = tl.load(scalars + FROM_GRAD) != 0
        sum_form = tl.load(scalars + SUM_FORM) != 0
        nesterov = tl.load(scalars + NESTEROV) != 0
        begin = chunk * CHUNK
        count = count_of(row, begin, ACCESS)
        for i in range(0, count, TILE):
            within = i + tl.arange(0, TILE)
            mask = within < count
            _at_p, at_g, at_m = places(table, layouts_at, row, begin + within, ACCESS)
            g = load(grad, at_g, mask, GRAD, S)
            m = load(momentum_buffer, at_m, mask, MOMENTUM_BUFFER, S)
            m = moved(g, m, weight, momentum, factor, from_grad, sum_form)
            u = tl.where(nesterov, moved(g, m, weight, momentum, factor, from_grad, sum_form), m)
            store(momentum_buffer, at_m, mask, m, MOMENTUM_BUFFER)
            store(values, begin + within, mask, u, WIDE)


@triton.jit
def moved(g, m, weight, momentum, factor, from_grad, sum_form):
    """The momentum one step ahead; operations and roundings are C++'s."""
    g = factor * g
    average = tl.fma(weight, g - m, tl.where(from_grad, g, m))
    return tl.where(sum_form, tl.fma(momentum, m, g), average)


@triton.jit(do_not_specialize=["block_at", "layouts_at"])
def after_kernel(
    table, all_scalars, block_at, layouts_at,
    PARAM: tl.constexpr,
    ACCESS: tl.constexpr,
    STATISTICS: tl.constexpr,  # 0: none, 1: of rows, 2: of columns
    TILE: tl.constexpr,
):  # fmt: skip
    """The parameter, of one chunk of a matrix."""
    row, chunk = find_chunk(table, block_at, MATRIX_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS_AT) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        S: tl.constexpr = tl.float64 if PARAM == FLOAT64 else tl.float32
        WIDE: tl.constexpr = FLOAT64 if PARAM == FLOAT64 else FLOAT32
        param = pointer(tl.load(row), PARAM, ACCESS == VECTOR)
        values = pointer(tl.load(row + VALUES), WIDE, True)
        decay = tl.load(scalars + DECAY).to(S)
        cautious = tl.load(scalars + CAUTIOUS) != 0
        rate = tl.load(scalars + RATE) * double(row + SCALE_AT)
        begin = chunk * CHUNK
        count = count_of(row, begin, ACCESS)
        for i in range(0, count, TILE):
            within = i + tl.arange(0, TILE)
            mask = within < count
            at_p, _at_g, _at_m = places(table, layouts_at, row, begin + within, ACCESS)
            p = load(param, at_p, mask, PARAM, S)
            o = load(values, begin + within, mask, WIDE, S)
            own_rate = rate
            if STATISTICS != 0:
                width = tl.load(row + WIDTH_AT)
                place = begin + within
                line = place // width if STATISTICS == 1 else place % width
                lines = tl.load(row + LINES).to(tl.pointer_type(tl.float64))
                keep = tl.load(tl.load(row + KEEP).to(tl.pointer_type(tl.float64)))
                own_rate = rate * (tl.load(lines + line, mask=mask, other=0) * keep)
            decayed = p * decay
            decayed = tl.where(cautious, tl.where(o * p >= 0, decayed, p), decayed)
            store(param, at_p, mask, tl.fma(own_rate.to(S), o, decayed), PARAM)


# ---- NorMuon's statistics


@triton.jit(do_not_specialize=["block_at"])
def sums_kernel(table, block_at, WIDE: tl.constexpr, STATISTICS: tl.constexpr):
    """The sums of squares of some lines."""
    row, chunk = find_chunk(table, block_at, MATRIX_WORDS)
    values = pointer(tl.load(row + VALUES), WIDE, True)
    S: tl.constexpr = tl.float64 if WIDE == FLOAT64 else tl.float32
    height = tl.load(row + HEIGHT_AT)
    width = tl.load(row + WIDTH_AT)
    lines = tl.load(row + LINES).to(tl.pointer_type(tl.float64))
    if STATISTICS == 1:
        total = tl.zeros([ROW_TILE], tl.float64)
        for i in range(0, width.to(tl.int32), ROW_TILE):
            at = i + tl.arange(0, ROW_TILE)
            o = load(values, chunk * width + at, at < width, WIDE, S, "")
            total += tl.where(at < width, o.to(tl.float64) * o.to(tl.float64), 0)
        tl.store(lines + chunk, tl.sum(total, axis=0))
    else:
        down = tl.arange(0, ROW_TILE // LINE_TILE)[:, None]
        line = chunk * LINE_TILE + tl.arange(0, LINE_TILE)
        totals = tl.zeros([ROW_TILE // LINE_TILE, LINE_TILE], tl.float64)
        for i in range(0, height.to(tl.int32), ROW_TILE // LINE_TILE):
            mask = (i + down < height) & (line[None, :] < width)
            o = load(values, (i + down) * width + line[None, :], mask, WIDE, S, "")
            totals += tl.where(mask, o.to(tl.float64) * o.to(tl.float64), 0)
        tl.store(lines + line, tl.sum(totals, axis=0), mask=line < width)


@triton.jit(do_not_specialize=["block_at"])
def scales_kernel(table, all_scalars, block_at, STATISTICS: tl.constexpr):
    """From a matrix's sums to its lines' scales; updates v. One thread block each."""
    row, _chunk = find_chunk(table, block_at, MATRIX_WORDS)
    scalars = all_scalars + tl.load(row + SCALARS_AT) * SCALAR_WORDS
    if tl.load(scalars + SKIP) == 0:
        height = tl.load(row + HEIGHT_AT)
        width = tl.load(row + WIDTH_AT)
        count = height if STATISTICS == 1 else width
        each = width if STATISTICS == 1 else height
        lines = tl.load(row + LINES).to(tl.pointer_type(tl.float64))
        row_sq = tl.load(row + ROW_SQ).to(tl.pointer_type(tl.float32))
        beta2 = tl.load(scalars + BETA2)
        before = tl.zeros([ALL_LINES], tl.float64)
        after = tl.zeros([ALL_LINES], tl.float64)
        for i in range(0, count.to(tl.int32), ALL_LINES):
            line = i + tl.arange(0, ALL_LINES)
            mask = line < count
            total = tl.load(lines + line, mask=mask, other=0)
            v = tl.load(row_sq + line, mask=mask, other=0).to(tl.float64)
            v = tl.fma(beta2, v, (1 - beta2) * (total / each.to(tl.float64)))
            scale = 1 / (tl.sqrt(v) + 1e-10)
            tl.store(row_sq + line, v.to(tl.float32), mask=mask)
            tl.store(lines + line, scale, mask=mask)
            before += total
            after += tl.where(mask, total * scale * scale, 0)
        keep = tl.sqrt(tl.sum(before, axis=0)) / (tl.sqrt(tl.sum(after, axis=0)) + 1e-10)
        tl.store(tl.load(row + KEEP).to(tl.pointer_type(tl.float64)), keep)


# ---- launching


def launch(
    rows: Ints,
    layouts: Ints,
    matrices: Ints,
    runs: list[tuple[Any, ...]],
    options: Ints,
    loss_scale: Ints,
    gpu: int = 0,
    stream: int | None = None,
) -> None:
    """One step over packed rows and the matrices in them, without waiting for the device.

    Args:
        rows, layouts, matrices, options, loss_scale: as ``packed()`` of a plan gives them.
        runs: of each schedule: its first matrix, the one after its last, whether arithmetic is
            float64, and the schedule.
        gpu, stream: as in ``adamw.launch``.

    Raises:
        ValueError: an array lies where a GPU can't access it. Nothing is written.
    """
    _table.check_alignment(rows, NAMES)
    matrices = matrices.reshape(-1, GIVEN_WORDS)
    with _table.working_on(gpu, stream) as device:
        scalars = _scalars(options, loss_scale, device)
        for begin, end, wide, *schedule in runs:
            steps, gram_from, *codes = schedule
            names = [newton_schulz.NAMES_OF[code] for code in codes]
            for first, last in _waves(matrices[begin:end]):
                wave = Wave(rows, layouts, matrices[begin + first : begin + last], wide, device)
                wave.run(Schedule(tuple(steps), gram_from, *names), scalars)


def _scalars(options: Ints, loss_scale: Ints, device: torch.device) -> torch.Tensor:
    records = options.size // OPTION_WORDS.value
    words = _table.send(np.concatenate([options, loss_scale]), device)
    scalars = torch.empty(records * SCALAR_WORDS.value, dtype=torch.float64, device=device)
    if records:
        prepare_kernel[(records,)](words, 0, options.size, scalars, num_warps=1, **LAUNCH_OPTIONS)
    return scalars


def _waves(matrices: Ints) -> Iterator[tuple[int, int]]:
    sizes = (matrices[:, HEIGHT] * matrices[:, WIDTH]).tolist()
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > WAVE:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)


class Wave:
    """Matrices on their way through a step: their values, and their lines' statistics."""

    def __init__(
        self, rows: Ints, layouts: Ints, matrices: Ints, wide: bool, device: torch.device
    ) -> None:
        self.matrices, self.device = matrices, device
        self.code = FLOAT64.value if wide else FLOAT32.value
        own = rows[matrices[:, ROW]]
        self.normuon = bool((own[:, ROLES] != 0).any())
        self._allocate(wide)
        self._pack(own, layouts)

    def _allocate(self, wide: bool) -> None:
        m = self.matrices
        self.numel = m[:, HEIGHT] * m[:, WIDTH]
        self.lines = np.where(m[:, BY_COLUMN] != 0, m[:, WIDTH], m[:, HEIGHT])
        dtype = torch.float64 if wide else torch.float32
        each = -(-self.numel // SPAN.value) * SPAN.value  # so that each is aligned
        self.values = torch.empty(int(each.sum()), dtype=dtype, device=self.device)
        self.values_at = self.values.data_ptr() + dtype.itemsize * (np.cumsum(each) - each)
        count = int(self.lines.sum() + len(m)) if self.normuon else 0
        self.statistics = torch.empty(count, dtype=torch.float64, device=self.device)
        address = self.statistics.data_ptr()
        self.keep_at = address + 8 * np.arange(len(m))
        self.lines_at = address + 8 * (len(m) + np.cumsum(self.lines) - self.lines)

    def _pack(self, own: Ints, layouts: Ints) -> None:
        m = self.matrices
        self.dtypes = _table.dtype_codes(own, ROLES)
        sizes = np.take(_table.ITEMSIZE, self.dtypes)
        flat = own[:, _table.LAYOUT] < 0
        joined = flat & ((m[:, STRIDE] == m[:, WIDTH]) | (m[:, HEIGHT] == 1))
        begins = own[:, :ROLES] + m[:, [OFFSET]] * sizes
        vector = joined & (begins % VECTOR_BYTES == 0).all(axis=1)
        vector &= self.numel % SPAN.value == 0
        single, strided = _table.SINGLE.value, STRIDED.value
        self.access = np.where(vector, VECTOR.value, np.where(flat, single, strided))
        words = np.column_stack(
            [
                np.where(vector[:, None], begins, own[:, :ROLES]),
                own[:, ROLES] + 4 * m[:, FIRST_LINE],
                *(self.values_at, self.lines_at, own[:, _table.SCALARS], own[:, _table.LAYOUT]),
                *(m[:, c] for c in (OFFSET, HEIGHT, WIDTH, STRIDE, SCALE)),
                self.keep_at,
            ]
        ).astype(np.int64)
        parts, at = [words.ravel(), layouts], words.size + layouts.size
        self.layouts_at = words.size
        statistics = np.where(m[:, BY_COLUMN] != 0, 2, 1) if self.normuon else np.zeros_like(flat)
        chunks = -(-self.numel // CHUNK.value)
        by_line = np.where(statistics == 1, self.lines, -(-self.lines // LINE_TILE.value))
        self.stages: dict[str, list[tuple[tuple[int, ...], int, int]]] = {}
        for stage, columns, blocks in (
            ("before", [self.dtypes, self.access], chunks),
            ("sums", [statistics], by_line),
            ("scales", [statistics], np.ones_like(chunks)),
            ("after", [self.dtypes[:, 0], self.access, statistics], chunks),
        ):
            for key, found in _table.grouped(np.column_stack(columns).astype(np.int64), blocks):
                self.stages.setdefault(stage, []).append((key, found.size, at))
                parts.append(found)
                at += found.size
        self.table = _table.send(np.concatenate(parts), self.device)

    def run(self, schedule: Schedule, scalars: torch.Tensor) -> None:
        at = (self.layouts_at,)
        self._launch("before", before_kernel, (self.table, scalars), at, (TILE,))
        newton_schulz.orthogonalize(self._products(), schedule, self.device)
        if self.normuon:
            self._launch("sums", sums_kernel, (self.table,), (), (), (self.code,))
            self._launch("scales", scales_kernel, (self.table, scalars), (), ())
        self._launch("after", after_kernel, (self.table, scalars), at, (TILE,))

    def _launch(
        self, stage: str, kernel: Any, tensors: Any, at: Any, last: Any, first: Any = ()
    ) -> None:
        for key, blocks, block_at in self.stages[stage]:
            kernel[(blocks,)](
                *tensors, block_at, *at, *first, *key, *last,
                num_warps=THREADS // 32, **LAUNCH_OPTIONS,
            )  # fmt: skip

    def _products(self) -> Ints:
        m, one = self.matrices, np.ones(len(self.matrices), np.int64)
        columns = [self.values_at, self.values_at, m[:, HEIGHT], m[:, WIDTH]]
        columns += [m[:, WIDTH], one, m[:, WIDTH], one, self.code * one, self.code * one]
        return np.column_stack(columns)
