"""Products of Newton–Schulz: of batches of matrices that lie evenly apart, padded to whole tiles.

    symmetric:  C = alpha A B' + beta D      A, B long (or square), and A B' symmetric, as D
    wide:       Y = alpha A X + beta X       A square, X wide

A symmetric product is computed by the tiles of its lower triangle alone and stored twice, which
saves nearly half of its 2 n^2 k operations; its bits are symmetric, as a diagonal tile's lower half
is stored twice too. Each element is a sum in float32 (float64 for float64) in one fixed order,
whatever the batch, and is rounded once. float32 multiplies as float32, never as TF32.

Padding is zeros, so nothing is masked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedopt.triton_kernels._storage import (
    INTERPRETED,
    LAUNCH_OPTIONS,
    bf16_to_float,
    float_to_bf16,
)

GROUP = tl.constexpr(8)  # rows of tiles that go together through a wide product


@dataclass(frozen=True)
class Tiles:
    """How products of one shape and dtype are cut, and launched."""

    edge: int  # of symmetric tiles, and height of wide ones
    width: int
    depth: int  # of what is multiplied at a time
    stages: int
    each: int  # elements of a tile to a warp

    @property
    def symmetric_warps(self) -> int:
        return self._warps(self.edge * self.edge)

    @property
    def wide_warps(self) -> int:
        return self._warps(self.edge * self.width)

    def _warps(self, elements: int) -> int:
        return min(8, max(1, elements // self.each))


def tiles_for(n: int, m: int, dtype: torch.dtype, arch: int) -> Tiles:
    """The tiles for n x m matrices, n <= m.

    The number of matrices has no part in it: a matrix has the same bits alone and in a batch.
    """
    if dtype in (torch.float32, torch.float64):
        edge, width = _edge(n, 64), _edge(m, 64)
        return Tiles(edge, width, 16, 2, 512 if dtype == torch.float64 else 1024)
    edge = _edge(n, 128 if n >= 3 * 128 else 64)  # a lone tile would save nothing by symmetry
    wide = arch == 90 and edge == 128 and m >= 2048  # elsewhere it would spill, or not fit
    width, stages = _edge(m, 256 if wide else 128), 3 if edge >= 64 else 2
    return Tiles(edge, width, min(edge, 64), stages, 1024)


def _edge(length: int, largest: int) -> int:
    """The largest edge whose tiles exceed a side by an eighth of it, or no more than least ones."""
    most = max(length + length // 8, padded(length, 16))
    edge = largest
    while padded(length, edge) > most:
        edge //= 2
    return edge


def padded(length: int, edge: int) -> int:
    return -(-length // edge) * edge


# ---- in a kernel


@triton.jit
def operand(first):
    # In the interpreter bfloat16 passes as its bits; in float32 its products are exact.
    tile = tl.load(first)
    if tile.dtype == tl.uint16:
        tile = bf16_to_float(tile)
    return tile


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    if tl.uint16 == DTYPE:
        return float_to_bf16(value)
    else:
        return value.to(DTYPE)


@triton.jit
def lower_tile(tile):
    """Row and column of a tile, counted row by row through the lower triangle."""
    # The root of 8 r (r + 1) / 2 + 1 is exact, so a row begins where it should.
    row = ((tl.sqrt((8 * tile + 1).to(tl.float64)) - 1) / 2).to(tl.int32)
    return row, tile - row * (row + 1) // 2


@triton.jit
def place(row, column, stride):
    """Of a tile's first element, in 64 bits; within a tile 32 are enough."""
    return row.to(tl.int64) * stride + column


@triton.jit
def offsets(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, stride):
    return tl.arange(0, HEIGHT)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def store_twice(first, n, row, column, tile, EDGE: tl.constexpr):
    """A tile and its mirror image; of a diagonal one, the lower half."""
    here = first + place(row, column, n) + offsets(EDGE, EDGE, n)
    mirrored = first + place(column, row, n) + offsets(EDGE, EDGE, n)
    if row == column:
        down = tl.arange(0, EDGE)[:, None]
        across = tl.arange(0, EDGE)[None, :]
        tl.store(here, tile, mask=down >= across)
        tl.store(mirrored, tl.trans(tile), mask=down < across)
    else:
        tl.store(here, tile)
        tl.store(mirrored, tl.trans(tile))


@triton.jit(do_not_specialize=["numbers_at", "used", "tiles"])
def symmetric_kernel(
    numbers,  # float64
    a, b, d, c, q,
    numbers_at,  # of alpha, beta, shift
    used,  # rows that are not padding
    tiles,  # of a matrix
    n, depth,
    EDGE: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD: tl.constexpr,  # beta D
    SHIFTED: tl.constexpr,  # Q = C + shift I is stored too
):  # fmt: skip
    S: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = lower_tile(tl.program_id(0) % tiles)
    row *= EDGE
    column *= EDGE
    left = a + matrix * n * depth + place(row, 0, depth) + offsets(EDGE, DEPTH, depth)
    right = b + matrix * n * depth + place(column, 0, depth) + offsets(EDGE, DEPTH, depth)
    total = tl.zeros([EDGE, EDGE], S)
    for _ in range(0, depth, DEPTH):
        total = tl.dot(operand(left), tl.trans(operand(right)), total, input_precision="ieee")
        left += DEPTH
        right += DEPTH
    square = matrix * n * n
    value = tl.load(numbers + numbers_at).to(S) * total
    if ADD:
        beside = d + square + place(row, column, n) + offsets(EDGE, EDGE, n)
        value = tl.fma(tl.load(numbers + numbers_at + 1).to(S), operand(beside).to(S), value)
    store_twice(c + square, n, row, column, rounded(value, c.dtype.element_ty), EDGE)
    if SHIFTED:
        rows = row + tl.arange(0, EDGE)[:, None]
        on_diagonal = (rows == column + tl.arange(0, EDGE)[None, :]) & (rows < used)
        shift = tl.load(numbers + numbers_at + 2).to(S)
        value = tl.where(on_diagonal, value + shift, value)
        store_twice(q + square, n, row, column, rounded(value, q.dtype.element_ty), EDGE)


@triton.jit(do_not_specialize=["numbers_at", "down", "tiles"])
def wide_kernel(
    numbers,
    a, x, y,
    numbers_at,  # of alpha, beta
    down,  # rows of tiles
    tiles,
    n, m,
    EDGE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD: tl.constexpr,  # beta X
):  # fmt: skip
    S: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = grouped_tile(tl.program_id(0) % tiles, down, tiles)
    row *= EDGE
    column *= WIDTH
    left = a + matrix * n * n + place(row, 0, n) + offsets(EDGE, DEPTH, n)
    right = x + matrix * n * m + column + offsets(DEPTH, WIDTH, m)
    total = tl.zeros([EDGE, WIDTH], S)
    for _ in range(0, n, DEPTH):
        total = tl.dot(operand(left), operand(right), total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * m
    value = tl.load(numbers + numbers_at).to(S) * total
    at = matrix * n * m + place(row, column, m) + offsets(EDGE, WIDTH, m)
    if ADD:
        value = tl.fma(tl.load(numbers + numbers_at + 1).to(S), operand(x + at).to(S), value)
    tl.store(y + at, rounded(value, y.dtype.element_ty))


@triton.jit
def grouped_tile(tile, down, tiles):
    """Row and column: some rows of tiles go together, so that caches hold what they share."""
    across = tiles // down
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return first + within % height, within // height


# ---- launching


def workspace_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels are given for a dtype: the interpreter takes bfloat16 by its bits."""
    return torch.uint16 if INTERPRETED.value and dtype == torch.bfloat16 else dtype


def symmetric(
    numbers: torch.Tensor,
    at: int,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None,
    c: torch.Tensor,
    q: torch.Tensor | None,
    used: int,
    tiles: Tiles,
) -> None:
    """C = alpha A B' + beta D, and Q = C + shift I, for batches (matrix, row, column).

    Args:
        numbers, at: where alpha, beta and shift are.
        d, q: None: without.
        used: how many rows are not padding.
    """
    count, n, depth = a.shape
    down = n // tiles.edge
    each = down * (down + 1) // 2
    symmetric_kernel[(count * each,)](
        numbers, a, b, a if d is None else d, c, c if q is None else q, at, used, each, n, depth,
        tiles.edge, tiles.depth, d is not None, q is not None,
        num_warps=tiles.symmetric_warps, num_stages=tiles.stages, **LAUNCH_OPTIONS,
    )  # fmt: skip


def wide(
    numbers: torch.Tensor,
    at: int,
    a: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    add: bool,
    tiles: Tiles,
) -> None:
    """Y = alpha A X, and beta X if it is to be added."""
    count, n, m = x.shape
    down = n // tiles.edge
    each = down * (m // tiles.width)
    wide_kernel[(count * each,)](
        numbers, a, x, y, at, down, each, n, m, tiles.edge, tiles.width, tiles.depth, add,
        num_warps=tiles.wide_warps, num_stages=tiles.stages, **LAUNCH_OPTIONS,
    )  # fmt: skip
