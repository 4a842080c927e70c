"""Newton–Schulz on a GPU by Triton: batches of matrices of one shape through one list of products.

    X <- G / |G|, short side as rows; then the schedule's steps, in one of two forms:
    standard:  R = XX'   Z = bR + cR^2   X <- aX + ZX
    Gram:      R = XX', Q = I; Z = bR + cR^2   Q <- aQ + QZ   R <- (aI + Z) R (aI + Z)
               at last, and at restarts, X <- QX

Operations for n x m with n <= m and T steps, symmetric products by half: T (3 n^2 m + n^3), and
3 n^2 m + (4 T - 3) n^3 with 3 (n^2 m - n^3) for each restart. Beside the products a matrix is read
twice and written once, and in its working precision written once and read once.

Each matrix is scaled by a power of two until its largest element is in [2^14, 2^15), rounded to the
schedule's dtype, and divided by its norm, which is summed in float64; so no scale of the input
overflows or vanishes. Products read and write the schedule's arithmetic, and add up in float32
(float64 for float64). Tall matrices are read and written transposed. Of a square one and its
transpose the same one is computed: of the first two mirrored elements that differ the larger comes
above the diagonal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fusedopt.triton_kernels import _gemm, _table
from fusedopt.triton_kernels._storage import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INTERPRETED,
    LAUNCH_OPTIONS,
    TRITON,
    bf16_to_float,
    float_to_bf16,
    load,
    maximum,
    pointer,
    round_to_odd,
    store,
)
from fusedopt.triton_kernels._table import SPAN, VECTOR_BYTES

Ints = NDArray[np.int64]

# What `launch` is given of a matrix: addresses, sizes, strides (in elements), codes of dtypes.
IN, OUT, ROWS, COLUMNS, IN_ROW, IN_COLUMN, OUT_ROW, OUT_COLUMN, IN_DTYPE, OUT_DTYPE, WORDS = range(
    11
)
# What kernels are told: addresses, and strides with the short side as rows.
(
    INPUT, OUTPUT, INPUT_ROW, INPUT_COLUMN, OUTPUT_ROW, OUTPUT_COLUMN, MATRIX_WORDS,
) = (tl.constexpr(i) for i in range(7))  # fmt: skip
# A matrix's numbers: two powers of two and a factor that normalise it, what becomes of it, and how
# a square one is turned.
FIRST, SECOND, INVERSE, FATE, TURN, NORM_WORDS = (tl.constexpr(i) for i in range(6))
NORMAL, ZERO, LOST = (tl.constexpr(i) for i in range(3))  # fates; LOST: it has NaN or infinity
TURNED, SYMMETRIC = (tl.constexpr(i) for i in range(1, 3))
# Which neighbours stand side by side in memory.
APART, BY_COLUMN, BY_ROW = (tl.constexpr(i) for i in range(3))

TILE = 4096  # elements of a thread block, before and after the products
THREADS = 128
PARTS = tl.constexpr(1024)  # of a norm, added up at a time
TOP_EXPONENT = tl.constexpr(14)
NO_PAIR = tl.constexpr(1 << 53)  # exact in float64
WAVE = 1 << 27  # elements of X that go through together, or one larger matrix

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CODES = {
    torch.float32: FLOAT32.value,
    torch.float64: FLOAT64.value,
    torch.bfloat16: BFLOAT16.value,
    torch.float16: FLOAT16.value,
}
NAMES_OF = {CODES[dtype]: name for name, dtype in DTYPES.items()}


# ---- what the products are


@dataclass(frozen=True)
class Product:
    """One launch: wide (Y = alpha A X + beta X), or symmetric (C = alpha A B' + beta D).

    Squares are named R, Z, Q, P, T; X and Y are the long ones and change places after each wide.
    """

    a: str
    b: str
    d: str  # "": none; of a wide one, "X"
    c: str
    numbers: tuple[float, float, float]  # alpha, beta, shift
    shifted: str = ""  # where C + shift I goes


def products(steps: tuple[tuple[float, float, float, bool], ...], gram: bool) -> list[Product]:
    """The schedule's steps as launches."""
    return list(_gram(steps) if gram else _standard(steps))


def _standard(steps: tuple[tuple[float, float, float, bool], ...]) -> Iterator[Product]:
    for a, b, c, _ in steps:
        yield Product("X", "X", "", "R", (1, 0, 0))
        if c:
            yield Product("R", "R", "R", "Z", (c, b, 0))
            yield Product("Z", "X", "X", "Y", (1, a, 0))
        else:
            yield Product("R", "X", "X", "Y", (b, a, 0))


def _gram(steps: tuple[tuple[float, float, float, bool], ...]) -> Iterator[Product]:
    q, free = "", ["Q", "P"]
    for i, (a, b, c, restart) in enumerate(steps):
        if restart or i == 0:
            if i:
                yield Product(q, "X", "", "Y", (1, 0, 0))
            yield Product("X", "X", "", "R", (1, 0, 0))
            q = ""
        # aI does not go into Z, whose small elements would be lost beside it.
        yield Product("R", "R", "R", "Z", (c, b, a), "" if q else free[0])
        if q:
            yield Product(q, "Z", q, free[0], (1, a, 0))
        q, free = free[0], free[::-1]
        if i + 1 < len(steps) and not steps[i + 1][3]:
            yield Product("R", "Z", "R", "T", (1, a, 0))
            yield Product("Z", "T", "T", "R", (1, a, 0))
    yield Product(q, "X", "", "Y", (1, 0, 0))


# ---- before the products


@triton.jit
def even(number):
    """The compiler can't know that it is a multiple of SPAN, without which accesses are narrow."""
    return number // SPAN * SPAN


@triton.jit
def sides(n, m, ALIGNED: tl.constexpr):
    if ALIGNED:
        n = even(n)
        m = even(m)
    return n, m


@triton.jit
def places(row, STRIDES: tl.constexpr, rows, columns, ORDER: tl.constexpr, ALIGNED: tl.constexpr):
    """Where elements stand; STRIDES: the word of the first of two strides."""
    by_row = tl.load(row + STRIDES)
    by_column = tl.load(row + STRIDES + 1)
    if ALIGNED:
        by_row = even(by_row)
        by_column = even(by_column)
    if ORDER == BY_COLUMN:
        at = rows.to(tl.int64) * by_row + columns
    elif ORDER == BY_ROW:
        at = rows + columns.to(tl.int64) * by_column
    else:
        at = rows.to(tl.int64) * by_row + columns.to(tl.int64) * by_column
    return at


@triton.jit
def scaling(largest):
    """Two powers of two that bring a number to [2^14, 2^15): one may be out of range."""
    tiny = largest < 2.2250738585072014e-308
    normal = tl.where(largest > 0, tl.where(tiny, largest * 18446744073709551616.0, largest), 1)
    exponent = (normal.to(tl.int64, bitcast=True) >> 52) - 1023 - tl.where(tiny, 64, 0)
    shift = TOP_EXPONENT - exponent
    return power_of_two(shift >> 1), power_of_two(shift - (shift >> 1))


@triton.jit
def power_of_two(exponent):
    return ((1023 + exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def quantised(x, DTYPE: tl.constexpr):
    """Rounded to a dtype; as float64 if it is that, else as float32."""
    if DTYPE == FLOAT64:
        q = x.to(tl.float64)
    elif DTYPE == FLOAT16:
        q = x.to(tl.float16).to(tl.float32)
    elif DTYPE == BFLOAT16:
        if x.dtype == tl.float64:
            x = round_to_odd(x)
        q = bf16_to_float(float_to_bf16(x))
    else:
        q = x.to(tl.float32)
    return q


@triton.jit
def tile_of(tiles, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This thread block's matrix, and the rows and columns of its tile."""
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    rows = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return matrix, rows, columns


@triton.jit(do_not_specialize=["matrices_at", "n", "m", "across", "tiles"])
def stats_kernel(
    table, parts, matrices_at, n, m, across, tiles,
    GIVEN: tl.constexpr, ROUNDING: tl.constexpr,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """A tile's largest magnitude, the sum of its scaled squares, its first difference."""
    matrix, rows, columns = tile_of(tiles, across, ROWS, COLUMNS)
    n, m = sides(n, m, ALIGNED)
    row = table + matrices_at + matrix * MATRIX_WORDS
    S: tl.constexpr = tl.float64 if GIVEN == FLOAT64 else tl.float32
    given = pointer(tl.load(row + INPUT), GIVEN, ALIGNED)
    mask = (rows < n) & (columns < m)
    at = places(row, INPUT_ROW, rows, columns, ORDER, ALIGNED)
    x = tl.where(mask, load(given, at, mask, GIVEN, S, ""), 0)
    largest = largest_magnitude(x)
    part = parts + tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    if SQUARE:
        # By mirrored pairs, so that a matrix and its transpose have the same sum.
        mirrored = places(row, INPUT_ROW, columns, rows, ORDER, ALIGNED)
        below = tl.where(mask, load(given, mirrored, mask, GIVEN, S, ""), 0)
        largest = maximum(largest, largest_magnitude(below))
        squares = scaled_squares(x, largest, ROUNDING)
        pairs = tl.where(rows < columns, squares + scaled_squares(below, largest, ROUNDING), 0)
        squares = tl.where(rows == columns, squares, pairs)
        # The first pair in row-major order; odd if the one below is larger.
        number = (rows.to(tl.int64) * n + columns) * 2 + (x < below).to(tl.int64)
        number = tl.where((rows < columns) & (x != below), number, NO_PAIR)
        tl.store(part + 2 * count, tl.min(tl.min(number, axis=1), axis=0).to(tl.float64))
    else:
        squares = scaled_squares(x, largest, ROUNDING)
    tl.store(part, largest)
    tl.store(part + count, tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def scaled_squares(x, largest, ROUNDING: tl.constexpr):
    first, second = scaling(largest)
    q = quantised(x * first.to(x.dtype) * second.to(x.dtype), ROUNDING).to(tl.float64)
    return q * q


@triton.jit
def largest_magnitude(x):
    """As float64; NaN if there is one, for NaNs have the largest bits."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True).to(tl.float64)
    return largest


@triton.jit(do_not_specialize=["tiles", "count"])
def norms_kernel(parts, norms, tiles, count, SQUARE: tl.constexpr):
    """From a matrix's parts to its numbers; one thread block each."""
    matrix = tl.program_id(0)
    first_part = parts + matrix.to(tl.int64) * tiles
    lane = tl.arange(0, PARTS)
    bits = tl.zeros([PARTS], tl.int64)
    for i in range(0, tiles, PARTS):
        found = tl.load(first_part + i + lane, mask=i + lane < tiles, other=0)
        bits = tl.maximum(bits, found.to(tl.int64, bitcast=True))
    largest = tl.max(bits, axis=0).to(tl.float64, bitcast=True)
    first, second = scaling(largest)
    total = tl.zeros([PARTS], tl.float64)
    least = tl.zeros([PARTS], tl.float64) + NO_PAIR
    for i in range(0, tiles, PARTS):
        mask = i + lane < tiles
        own = tl.load(first_part + i + lane, mask=mask, other=0)
        part = tl.load(first_part + count + i + lane, mask=mask, other=0)
        # The tile's powers of two exceed the matrix's; by how much is exact, or does not matter.
        own_first, own_second = scaling(own)
        ratio = (first / own_first) * (second / own_second)
        total += tl.where(own > 0, part * ratio * ratio, 0)
        if SQUARE:
            other = tl.load(first_part + 2 * count + i + lane, mask=mask, other=NO_PAIR)
            least = tl.minimum(least, other)
    fate = tl.where(largest == 0, ZERO, tl.where(largest < float("inf"), NORMAL, LOST))
    to = norms + matrix * NORM_WORDS
    tl.store(to + FIRST, first)
    tl.store(to + SECOND, second)
    tl.store(to + INVERSE, 1 / tl.sqrt(tl.sum(total, axis=0)))
    tl.store(to + FATE, fate.to(tl.float64))
    if SQUARE:
        pair = tl.min(least, axis=0).to(tl.int64)
        turn = tl.where(pair == NO_PAIR, SYMMETRIC, tl.where(pair % 2 == 1, TURNED, 0))
        tl.store(to + TURN, turn.to(tl.float64))


@triton.jit(do_not_specialize=["matrices_at", "n", "m", "across", "tiles"])
def load_kernel(
    table, norms, x_all, matrices_at, n, m, across, tiles,
    room_n, room_m,  # with padding
    GIVEN: tl.constexpr, ROUNDING: tl.constexpr, DTYPE: tl.constexpr,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """A tile of X, padding included."""
    matrix, rows, columns = tile_of(tiles, across, ROWS, COLUMNS)
    n, m = sides(n, m, ALIGNED)
    row = table + matrices_at + matrix * MATRIX_WORDS
    numbers = norms + matrix * NORM_WORDS
    S: tl.constexpr = tl.float64 if GIVEN == FLOAT64 else tl.float32
    given = pointer(tl.load(row + INPUT), GIVEN, ALIGNED)
    mask = (rows < n) & (columns < m)
    if SQUARE:
        if tl.load(numbers + TURN) == TURNED:
            at = places(row, INPUT_ROW, columns, rows, ORDER, ALIGNED)
            x = load(given, at, mask, GIVEN, S)
        else:
            at = places(row, INPUT_ROW, rows, columns, ORDER, ALIGNED)
            x = load(given, at, mask, GIVEN, S)
    else:
        at = places(row, INPUT_ROW, rows, columns, ORDER, ALIGNED)
        x = load(given, at, mask, GIVEN, S)
    x = x * tl.load(numbers + FIRST).to(S) * tl.load(numbers + SECOND).to(S)
    q = quantised(x, ROUNDING)
    q = q * tl.load(numbers + INVERSE).to(q.dtype)
    q = tl.where(tl.load(numbers + FATE) == NORMAL, tl.where(mask, q, 0), 0)
    here = rows.to(tl.int64) * room_m + columns
    inside = (rows < room_n) & (columns < room_m)
    store(x_all + matrix.to(tl.int64) * room_n * room_m, here, inside, q, DTYPE)


# ---- after the products


@triton.jit(do_not_specialize=["matrices_at", "n", "m", "across", "tiles"])
def store_kernel(
    table, norms, x_all, matrices_at, n, m, across, tiles,
    room_n, room_m,
    WANTED: tl.constexpr, DTYPE: tl.constexpr,
    ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """A tile of the result."""
    matrix, rows, columns = tile_of(tiles, across, ROWS, COLUMNS)
    n, m = sides(n, m, ALIGNED)
    row = table + matrices_at + matrix * MATRIX_WORDS
    numbers = norms + matrix * NORM_WORDS
    S: tl.constexpr = tl.float64 if DTYPE == FLOAT64 else tl.float32
    wanted = pointer(tl.load(row + OUTPUT), WANTED, ALIGNED)
    first = x_all + matrix.to(tl.int64) * room_n * room_m
    mask = (rows < n) & (columns < m)
    turned = False
    here = rows.to(tl.int64) * room_m + columns
    if SQUARE:
        turn = tl.load(numbers + TURN)
        turned = turn == TURNED
        lower = tl.where(columns > rows, columns.to(tl.int64) * room_m + rows, here)
        here = tl.where(turn == SYMMETRIC, lower, here)
    x = load(first, here, mask, DTYPE, S)
    fate = tl.load(numbers + FATE)
    x = tl.where(fate == NORMAL, x, tl.where(fate == ZERO, 0, float("nan")).to(S))
    if turned:
        at = places(row, OUTPUT_ROW, columns, rows, ORDER, ALIGNED)
        store(wanted, at, mask, x, WANTED)
    else:
        at = places(row, OUTPUT_ROW, rows, columns, ORDER, ALIGNED)
        store(wanted, at, mask, x, WANTED)


# ---- launching


def launch(array: Any, result: Any, schedule: Any, stream: int | None = None) -> None:
    """Orthogonalise each matrix of an array, without waiting for the device.

    Args:
        array, result: of torch, or what DLPack makes one of torch; of the same shape.
        schedule: ``_newton_schulz_schedule.Schedule``.
        stream: where; None: torch's current one.

    Raises:
        TypeError, ValueError: an array that has no memory that kernels can reach.
        RuntimeError: float64 by a Triton that can't multiply it.
    """
    array, result = _as_tensor(array, "G"), _as_tensor(result, "result")
    if array.numel() == 0:
        return
    matrices = np.hstack([_sides(array), _sides(result)])[:, _ORDER_OF_SIDES]
    device = array.device
    with _table.working_on(device.index or 0, stream) as on:
        orthogonalize(matrices, schedule, on)


def _as_tensor(array: Any, name: str) -> torch.Tensor:
    tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
    if tensor.is_neg():
        raise ValueError(f"{name}: negated lazily; call resolve_neg() first")
    if tensor.is_cuda == INTERPRETED.value:
        wanted = "the CPU: Triton's interpreter works there" if tensor.is_cuda else "a GPU"
        raise ValueError(
            f"{name} is on {tensor.device}, but backend 'triton' takes arrays on {wanted}"
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        raise TypeError(f"{name} ({type(array).__name__}) has no memory of its own")
    if tensor.data_ptr() % tensor.itemsize:
        raise ValueError(
            f"{name} lies at address {tensor.data_ptr():#x}, no multiple of its elements' "
            f"{tensor.itemsize} bytes; copy it"
        )
    return tensor


def _sides(tensor: torch.Tensor) -> Ints:
    """A line for each matrix: address, sizes, strides, dtype."""
    *batch, rows, columns = tensor.shape
    *apart, by_row, by_column = tensor.stride()
    address = np.array([tensor.data_ptr()])
    for size, stride in zip(batch, apart, strict=True):
        address = np.add.outer(address, tensor.itemsize * stride * np.arange(size)).ravel()
    same = [rows, columns, by_row, by_column, CODES[tensor.dtype]]
    return np.column_stack([address, np.tile(same, (address.size, 1))]).astype(np.int64)


_ORDER_OF_SIDES = [0, 6, 1, 2, 3, 4, 9, 10, 5, 11]


def orthogonalize(matrices: Ints, schedule: Any, device: torch.device) -> None:
    """Orthogonalise matrices, on the current stream; a result may lie in its input's place.

    Args:
        matrices: a line each, columns as ``IN`` to ``OUT_DTYPE``, none of them empty.
        schedule: as in ``launch``.
        device: where they are.
    """
    dtype = DTYPES[schedule.arithmetic]
    if dtype == torch.float64 and TRITON < (3, 5):
        raise RuntimeError("newton_schulz in float64 needs Triton 3.5 or later; pass dtype=")
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    for group in _groups(matrices):
        gram = group.m >= schedule.gram_from * group.n
        tiles = _gemm.tiles_for(group.n, group.m, dtype, arch)
        rounding = CODES[DTYPES[schedule.dtype]]
        _run(group, products(schedule.steps, gram), tiles, rounding, dtype, device)


@dataclass(frozen=True)
class Group:
    """Matrices of one shape, short side as rows, and one way to access them."""

    n: int
    m: int
    given: tuple[int, int, bool]  # dtype, order, whether aligned
    wanted: tuple[int, int, bool]
    words: Ints


def _groups(matrices: Ints) -> Iterator[Group]:
    tall = matrices[:, ROWS] > matrices[:, COLUMNS]
    n, m = np.sort(matrices[:, [ROWS, COLUMNS]], axis=1).T
    keys, words = [n, m], [matrices[:, IN], matrices[:, OUT]]
    for address, row, column, dtype in (
        (IN, IN_ROW, IN_COLUMN, IN_DTYPE),
        (OUT, OUT_ROW, OUT_COLUMN, OUT_DTYPE),
    ):
        by_row = np.where(tall, matrices[:, column], matrices[:, row])
        by_column = np.where(tall, matrices[:, row], matrices[:, column])
        order = np.where(by_column == 1, BY_COLUMN.value, np.where(by_row == 1, BY_ROW.value, 0))
        apart = np.where(order == BY_COLUMN.value, by_row, by_column)
        aligned = (order > 0) & (matrices[:, address] % VECTOR_BYTES == 0)
        aligned &= (np.column_stack([apart, n, m]) % SPAN.value == 0).all(axis=1)
        keys += [matrices[:, dtype], order, aligned]
        words += [by_row, by_column]
    words, keys = np.column_stack(words), np.column_stack(keys)
    unique, member_of = np.unique(keys, axis=0, return_inverse=True)
    for i, key in enumerate(unique.tolist()):
        members = words[member_of.ravel() == i]
        yield Group(key[0], key[1], tuple(key[2:5]), tuple(key[5:8]), members)


def _run(
    group: Group,
    steps: list[Product],
    tiles: _gemm.Tiles,
    rounding: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """All products of a group, some of its matrices after others."""
    room_n = _gemm.padded(group.n, tiles.edge)
    room_m = _gemm.padded(group.m, max(tiles.width, tiles.depth))
    at_once = max(1, WAVE // (room_n * room_m))
    numbers = np.array([step.numbers for step in steps], np.float64)
    for begin in range(0, len(group.words), at_once):
        words = group.words[begin : begin + at_once]
        wave = Wave(group, words, numbers, rounding, dtype, device)
        x, y = torch.empty((2, wave.count, room_n, room_m), dtype=wave.stored, device=device)
        wave.load(x)
        x = _multiply(wave, steps, x, y, tiles)
        wave.store(x)


def _multiply(
    wave: "Wave", steps: list[Product], x: torch.Tensor, y: torch.Tensor, tiles: _gemm.Tiles
) -> torch.Tensor:
    count, room_n, _ = x.shape
    names = sorted({name for s in steps for name in (s.c, s.shifted)} - {"", "X", "Y"})
    shape = (len(names), count, room_n, room_n)
    stack = torch.empty(shape, dtype=x.dtype, device=x.device)
    at = dict(zip(names, stack, strict=True))
    for i, step in enumerate(steps):
        if step.c == "Y":
            _gemm.wide(wave.numbers, 3 * i, at[step.a], x, y, step.d == "X", tiles)
            x, y = y, x
        else:
            of = {**at, "X": x}
            _gemm.symmetric(
                wave.numbers, 3 * i, of[step.a], of[step.b], of.get(step.d), at[step.c],
                at.get(step.shifted), wave.group.n, tiles,
            )  # fmt: skip
    return x


class Wave:
    """Some matrices of a group, and what is known of them on the device."""

    def __init__(
        self,
        group: Group,
        words: Ints,
        numbers: NDArray[np.float64],
        rounding: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group, self.count = group, len(words)
        self.rounding, self.code, self.stored = rounding, CODES[dtype], _gemm.workspace_dtype(dtype)
        sent = np.concatenate([numbers.ravel().view(np.int64), words.ravel()])
        self.table = _table.send(sent, device)
        self.numbers = self.table[: numbers.size].view(torch.float64)
        self.matrices_at = numbers.size
        self.norms = torch.empty(self.count * NORM_WORDS.value, dtype=torch.float64, device=device)

    def load(self, x: torch.Tensor) -> None:
        """Normalise the matrices into X."""
        square = self.group.n == self.group.m
        across, tiles = self._tiles(self.group.n, self.group.m)
        each = tiles * self.count
        parts = torch.empty((2 + square) * each, dtype=torch.float64, device=x.device)
        stats_kernel[(each,)](
            self.table, parts, self.matrices_at, self.group.n, self.group.m, across, tiles,
            *self._constants(self.group.given, self.rounding), **_BESIDE,
        )  # fmt: skip
        norms_kernel[(self.count,)](parts, self.norms, tiles, each, square, **_BESIDE)
        codes = self.rounding, self.code
        self._launch(load_kernel, x, x.shape[1:], self._constants(self.group.given, *codes))

    def store(self, x: torch.Tensor) -> None:
        """Write the result."""
        over = self.group.n, self.group.m
        self._launch(store_kernel, x, over, self._constants(self.group.wanted, self.code))

    def _launch(self, kernel: Any, x: torch.Tensor, over: Any, constants: Any) -> None:
        across, tiles = self._tiles(*over)
        bits = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
        kernel[(tiles * self.count,)](
            self.table, self.norms, bits, self.matrices_at, self.group.n, self.group.m, across,
            tiles, *x.shape[1:], *constants, **_BESIDE,
        )  # fmt: skip

    def _constants(self, access: tuple[int, int, bool], *codes: int) -> tuple[Any, ...]:
        dtype, order, aligned = access
        square = self.group.n == self.group.m
        return dtype, *codes, order, bool(aligned), *tile_shape(self.group.n), square

    def _tiles(self, n: int, m: int) -> tuple[int, int]:
        """Tiles side by side, and all of a matrix."""
        rows, columns = tile_shape(self.group.n)
        across = -(-m // columns)
        return across, across * -(-n // rows)


_BESIDE = {"num_warps": THREADS // 32, **LAUNCH_OPTIONS}


def tile_shape(n: int) -> tuple[int, int]:
    """Of tiles before and after the products."""
    rows = min(64, triton.next_power_of_2(n))
    return rows, TILE // rows
