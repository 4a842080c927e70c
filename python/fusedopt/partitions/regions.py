"""Where the blocks of a partition lie in an array: the form that every kernel takes."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedopt.partitions.kinds import (
    Contiguous,
    Each,
    Heads,
    Partition,
    Repeat,
    Slices,
    Transposed,
    parse,
)


class Region(NamedTuple):
    """A matrix inside the array flattened in row-major order.

    A block is ``group`` consecutive columns in all rows; the last block may be narrower.
    """

    offset: int  # first element
    rows: int
    columns: int
    stride: int  # elements between rows; irrelevant when rows == 1
    group: int

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.group)


def resolve(partition: Partition, shape: Sequence[int]) -> tuple[Region, ...]:
    """The regions of a partition of an array of this shape; they tile it.

    Blocks are numbered region by region. An empty array has no regions. ``"global"`` gives the
    region of ``"tensor"``: joining the tensors is the caller's.

    Raises:
        TypeError, ValueError: no partition, or it does not fit the shape.
    """
    partition = parse(partition)
    name = "tensor" if partition == "global" else partition
    sizes = tuple(shape) or (1,)
    try:
        regions = _straight(name, sizes, 0)
    except ValueError as error:
        raise ValueError(f"partition {partition!r} of shape {tuple(shape)}: {error}") from None
    return _join([region for region in regions if region.rows * region.columns])


def block_count(partition: Partition, shape: Sequence[int]) -> int:
    """How many blocks: the length of ``block_sq``. 1 for ``"global"``, else 0 if shape is empty."""
    regions = resolve(partition, shape)
    return 1 if partition == "global" else sum(region.blocks for region in regions)


def block_ids(partition: Partition, shape: Sequence[int]) -> NDArray[np.int64]:
    """The block's number of every element."""
    ids = np.empty(prod(shape), np.int64)
    first = 0
    for region in resolve(partition, shape):
        rows = region.offset + region.stride * np.arange(region.rows, dtype=np.int64)
        columns = np.arange(region.columns, dtype=np.int64)
        ids[rows[:, None] + columns] = first + columns // region.group
        first += region.blocks
    return ids.reshape(tuple(shape))


def _straight(partition: Partition, shape: tuple[int, ...], offset: int) -> list[Region]:
    """Regions of a whole array that begins at ``offset``."""
    length, inner = shape[0], prod(shape[1:])
    if isinstance(partition, Slices):
        return [
            region
            for start, stop, part in _slices(partition, length)
            for region in _straight(part, (stop - start, *shape[1:]), offset + start * inner)
        ]
    if isinstance(partition, Repeat):
        part = _divide(length, partition.n, repr(partition))
        return [
            region
            for i in range(partition.n)
            for region in _straight(
                partition.partition, (part, *shape[1:]), offset + i * part * inner
            )
        ]
    if isinstance(partition, Each):
        if len(shape) < 2:
            raise ValueError(f"{partition!r} needs two axes or more")
        return [
            region
            for i in range(length)
            for region in _straight(partition.partition, shape[1:], offset + i * inner)
        ]
    if isinstance(partition, Transposed):
        return _crossed(partition.partition, offset, length, inner, inner)
    if partition == "column":
        return [Region(offset, length, inner, inner, 1)]
    return [_run(offset, length * inner, _run_length(partition, length, inner))]


def _run_length(partition: Partition, length: int, inner: int) -> int:
    if isinstance(partition, Heads):
        return _head_rows(partition, length) * inner
    if isinstance(partition, Contiguous):
        return partition.n
    if partition == "coordinate":
        return 1
    if partition == "row":
        return inner
    if partition == "tensor":
        return length * inner
    raise ValueError('"global" joins whole tensors, so it cannot stand inside another partition')


def _crossed(
    partition: Partition, offset: int, rows: int, columns: int, stride: int
) -> list[Region]:
    """Regions of the transpose's partition, for a matrix of these rows and columns as stored."""
    if isinstance(partition, Slices):
        return [
            region
            for start, stop, part in _slices(partition, columns)
            for region in _crossed(part, offset + start, rows, stop - start, stride)
        ]
    if isinstance(partition, Repeat):
        width = _divide(columns, partition.n, repr(partition))
        return [
            region
            for i in range(partition.n)
            for region in _crossed(partition.partition, offset + i * width, rows, width, stride)
        ]
    if isinstance(partition, Heads):
        return [Region(offset, rows, columns, stride, max(1, _head_rows(partition, columns)))]
    if partition == "row":
        return [Region(offset, rows, columns, stride, 1)]
    if partition == "tensor":
        return [Region(offset, rows, columns, stride, max(1, columns))]
    if partition in ("column", "coordinate"):
        group = columns if partition == "column" else 1
        return [_run(offset + i * stride, columns, group) for i in range(rows)]
    raise ValueError(f"{partition!r} cannot stand inside Transposed")


def _run(offset: int, length: int, group: int) -> Region:
    return Region(offset, 1, length, length, max(1, min(group, length)))


def _slices(partition: Slices, length: int) -> list[tuple[int, int, Partition]]:
    stops = [length if stop is None else stop for stop in partition.stops]
    if max(stops) != length:
        raise ValueError(f"its slices end at {max(stops)}, expected {length}, the end of the axis")
    return [
        (a, b, p) for (a, b), p in zip(pairwise((0, *stops)), partition.partitions, strict=True)
    ]


def _head_rows(heads: Heads, length: int) -> int:
    if heads.n is not None:
        return _divide(length, heads.n, repr(heads))
    assert heads.head_dim is not None
    _divide(length, heads.head_dim, repr(heads))
    return heads.head_dim


def _divide(length: int, n: int, what: str) -> int:
    if length % n:
        raise ValueError(f"{what} does not divide an axis of {length}")
    return length // n


def _join(regions: list[Region]) -> tuple[Region, ...]:
    """Neighbours with blocks of one kind as one region; the numbering of blocks stays."""
    joined: list[Region] = []
    for region in regions:
        last = joined[-1] if joined else None
        if last is not None and _continues(last, region):
            columns = last.columns + region.columns
            stride = columns if last.rows == 1 else last.stride
            joined[-1] = last._replace(columns=columns, stride=stride)
        else:
            joined.append(region)
    return tuple(joined)


def _continues(last: Region, region: Region) -> bool:
    return (
        last.group == region.group
        and last.rows == region.rows
        and last.columns % last.group == 0
        and region.offset == last.offset + last.columns
        and (last.rows == 1 or last.stride == region.stride)
    )
