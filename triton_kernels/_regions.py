"""Regions of blocks on their way to a Triton kernel: how each goes, cut into tiles, packed.

A region (``csrc/common/tensor_table.h``) goes one of four ways. Each way has stages and each stage
launches; a launch takes the regions of one key, with a thread block for each of their tiles.

In two passes, a tile has up to `PIECE` elements. In a region of one row it is a piece of a block
and makes one part of its sum; in a region of more rows it is a strip of columns and makes a part
for each. Parts are a matrix of ``layers`` by ``width``; a block's are ``part_group`` columns of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray

from fusedopt.triton_kernels import _table
from fusedopt.triton_kernels._storage import FLOAT64
from fusedopt.triton_kernels._table import CHUNK, ITEMSIZE, SINGLE, SPAN, STRIDED, VECTOR

Ints = NDArray[np.int64]

ROLES = 4  # params, grads, exp_avgs, block_sqs
# A region in the table: the roles' addresses, then these.
(
    SCALARS, LAYOUT, OFFSET, ROWS, COLUMNS, STRIDE, GROUP,
    PARTS, SUMS, RATES,  # where in the workspace, in doubles
    COUNT,  # elements of a block over several tensors; else 0
    LAYERS, WIDTH, PART_GROUP,
    REGION_WORDS,
) = (tl.constexpr(ROLES + i) for i in range(15))  # fmt: skip

PIECE = tl.constexpr(16384)
STRIP = 128  # columns of a strip
RATES_TILE = tl.constexpr(128)
PARTS_TILE = tl.constexpr(1024)
FEW_LANES = 8  # to a block, where it has few parts

# Elements of a block that is read once: its tile stays in registers.
ONE_PASS = 8192
ONE_PASS_WIDE = 4096  # in float64, or by strides

ELEMENTS, COORDINATES, ONE, TWO = range(4)  # ways; the first are AdamW's, without and with strides


@dataclass(frozen=True)
class Launch:
    """One launch: its key, its thread blocks, and where the word of the first stands."""

    key: tuple[int, ...]
    thread_blocks: int
    block_at: int


@dataclass(frozen=True)
class Table:
    """All words and the launches of each stage."""

    words: Ints
    layouts_at: int
    copies_at: int
    copies: int
    more_at: list[int]
    workspace: int  # doubles
    elements: Ints  # rows as `adamw` packs them
    stages: dict[str, list[Launch]]


class Regions:
    """The columns of all regions, and what follows from them."""

    def __init__(self, regions: Ints, rows: Ints) -> None:
        """Both as ``packed()`` of a plan gives them."""
        row, offset, self.rows, self.columns, self.stride, self.group, first, self.shared = (
            regions.T
        )
        self.packed = rows[row]
        self.dtypes = _table.dtype_codes(self.packed, ROLES - 1)
        flat = self.packed[:, _table.LAYOUT] < 0
        self.offset = np.where(flat, 0, offset)
        moved = np.where(flat, offset, 0)[:, None] * np.take(ITEMSIZE, self.dtypes)
        self.elements_at = self.packed[:, : ROLES - 1] + moved
        self.block_sq_at = self.packed[:, ROLES - 1] + ITEMSIZE[0] * first
        self.blocks = _ceil(self.columns, self.group)
        self.access = self._access(flat)
        self.way = self._way(flat)
        self._cut()

    def _access(self, flat: NDArray[np.bool_]) -> Ints:
        apart = np.where(self.rows > 1, self.stride, self.group)
        even = (self.columns % SPAN.value == 0) & (apart % SPAN.value == 0)
        aligned = (self.elements_at % _table.VECTOR_BYTES == 0).all(axis=1)
        by_unit = np.where(even & aligned, VECTOR.value, SINGLE.value)
        return np.where(flat, by_unit, STRIDED.value)

    def _way(self, flat: NDArray[np.bool_]) -> Ints:
        wide = ~flat | (self.dtypes[:, 0] == FLOAT64.value)
        fits = self.group <= np.where(wide, ONE_PASS_WIDE, ONE_PASS)
        coordinates = np.where(flat, ELEMENTS, COORDINATES)
        own = np.where(self.group == 1, coordinates, np.where(fits, ONE, TWO))
        return np.where((self.rows > 1) | (self.shared >= 0), TWO, own)

    def _cut(self) -> None:
        strips = self.rows > 1
        self.strip = np.where(strips, _power_of_two(np.minimum(self.columns, STRIP)), 0)
        height = PIECE.value // np.maximum(self.strip, 1)
        pieces = _ceil(self.group, PIECE.value)
        self.layers = np.where(strips, _ceil(self.rows, height), 1)
        self.width = np.where(strips, self.columns, self.blocks * pieces)
        self.part_group = np.where(strips, self.group, pieces)
        beside = _ceil(self.columns, np.maximum(self.strip, 1))
        self.tiles = np.where(strips, self.layers * beside, self.width)


def _ceil(a: Any, b: Any) -> Ints:
    result: Ints = -(-a // b)
    return result


def _power_of_two(n: Ints) -> Ints:
    """The least one that is no less than n."""
    result: Ints = 2 ** np.ceil(np.log2(n)).astype(np.int64)
    return result


def pack(regions: Ints, copies: Ints, rows: Ints, layouts: Ints, more: tuple[Any, ...]) -> Table:
    """Lay everything out; arguments as of ``blockwise_adam.launch``."""
    r = Regions(regions, rows)
    words, workspace, joined = _region_words(r)
    pairs = _copy_pairs(r, copies)
    sent = [part.ravel().view(np.int64) for part in more]
    parts = [words.ravel(), layouts, pairs.ravel(), *sent]
    at = np.cumsum([0, *(part.size for part in parts)]).tolist()
    stages: dict[str, list[Launch]] = {}
    block_at = at[-1]
    for stage, key, blocks in _launches(r, words, joined):
        stages.setdefault(stage, []).append(Launch(key, blocks.size, block_at))
        parts.append(blocks)
        block_at += blocks.size
    return Table(
        np.concatenate(parts), at[1], at[2], len(pairs), at[3:-1], workspace, _elements(r), stages
    )


def _region_words(r: Regions) -> tuple[Ints, int, Ints]:
    """The regions' words, then those of blocks over several tensors; doubles; the latter's rows."""
    two, own = r.way == TWO, r.shared < 0
    part_count = np.where(two, r.layers * r.width, 0)
    sums = np.where(two & own, r.blocks, 0)
    rates = np.where(two, r.blocks, 0)
    order = np.argsort(r.shared, kind="stable")  # the parts of one block beside each other
    parts_at = np.empty_like(part_count)
    parts_at[order] = np.cumsum(part_count[order]) - part_count[order]
    sums_at = part_count.sum() + np.cumsum(sums) - sums
    rates_at = part_count.sum() + sums.sum() + np.cumsum(rates) - rates
    size = part_count.sum() + sums.sum() + rates.sum()
    count = np.zeros_like(sums)
    names, block_of = np.unique(r.shared[~own], return_inverse=True)
    joined = np.zeros((len(names), REGION_WORDS.value), np.int64)
    for i in range(len(names)):
        members = np.flatnonzero(~own)[block_of == i]
        sums_at[members] = size + i
        count[members] = (r.rows * r.columns)[members].sum()
        joined[i, [PARTS.value, SUMS.value]] = parts_at[members].min(), size + i
        joined[i, LAYERS.value] = 1
        joined[i, [WIDTH.value, PART_GROUP.value]] = part_count[members].sum()
    columns = [
        r.elements_at, r.block_sq_at, r.packed[:, [_table.SCALARS, _table.LAYOUT]], r.offset,
        r.rows, r.columns, r.stride, r.group, parts_at, sums_at, rates_at, count, r.layers, r.width,
        r.part_group,
    ]  # fmt: skip
    own_words = np.column_stack(columns)
    places = np.arange(len(names)) + len(own_words)
    return np.vstack([own_words, joined]), int(size) + len(names), places


def _copy_pairs(r: Regions, copies: Ints) -> Ints:
    """(to, from) of values that tensors without a gradient hold."""
    to, block = copies.reshape(-1, 2).T
    names, first = np.unique(r.shared, return_index=True)
    here = np.isin(block, names)
    source = r.block_sq_at[first[np.searchsorted(names, block[here])]]
    return np.column_stack([to[here], source])


def _elements(r: Regions) -> Ints:
    """Blocks of one coordinate as AdamW's rows; the roles agree."""
    chosen = r.way == ELEMENTS
    rows = r.packed[chosen].copy()
    rows[:, :ROLES] = np.column_stack([r.elements_at, r.block_sq_at])[chosen]
    rows[:, _table.NUMEL] = r.columns[chosen]
    return rows


def _launches(r: Regions, words: Ints, joined: Ints) -> Iterator[tuple[str, tuple[int, ...], Ints]]:
    """(stage, key, the words of its thread blocks)."""
    kinds = [r.dtypes, r.access]
    space = _power_of_two(r.group)
    tiles = _ceil(r.blocks, np.maximum(tile_elements(r.dtypes[:, 0], r.access, space) // space, 1))
    coordinates, one, two = (np.flatnonzero(r.way == way) for way in (COORDINATES, ONE, TWO))
    added = np.concatenate([np.flatnonzero((r.way == TWO) & (r.shared < 0)), joined])
    layers, width, group = words[added][:, [LAYERS.value, WIDTH.value, PART_GROUP.value]].T
    lanes = np.where(layers * group <= 8 * FEW_LANES, FEW_LANES, PARTS_TILE.value)
    sums = _ceil(_ceil(width, group), PARTS_TILE.value // lanes)
    for stage, members, key, chunks in (
        ("coordinates", coordinates, kinds, _ceil(r.columns, CHUNK.value)),
        ("one_pass", one, [*kinds, space], tiles),
        ("squares", two, [r.dtypes[:, 1], r.access, r.strip], r.tiles),
        ("rates", two, [np.zeros_like(r.group)], _ceil(r.blocks, RATES_TILE.value)),
        ("update", two, [*kinds, r.strip], r.tiles),
    ):
        for own, blocks in _table.grouped(np.column_stack(key)[members], chunks[members], members):
            yield stage, own, blocks
    for own, blocks in _table.grouped(lanes[:, None], sums, added):
        yield "sums", own, blocks


def tile_elements(param: Any, access: Any, space: Any) -> Ints:
    """Elements of a tile in one pass, for blocks of so much space."""
    wide = (np.asarray(param) == FLOAT64.value) | (np.asarray(access) == STRIDED.value)
    return np.maximum(space, np.where(wide, 1024, 2048))
