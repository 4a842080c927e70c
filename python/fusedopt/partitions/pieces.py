"""Which matrices a tensor holds: what Muon orthogonalises, each on its own."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from fusedopt.partitions.kinds import Each, Heads, Partition, Repeat, Slices, Transposed, parse
from fusedopt.partitions.regions import resolve


class Matrix(NamedTuple):
    """A matrix inside the array flattened in row-major order."""

    offset: int  # first element
    rows: int
    columns: int
    stride: int  # elements between rows
    transposed: bool  # stored (inputs, outputs), under ``Transposed``

    @property
    def outputs(self) -> int:
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.transposed else self.columns


def matrices(partition: Partition, shape: Sequence[int]) -> tuple[Matrix, ...]:
    """The matrices that a partition cuts an array of this shape into; they tile it.

    ``"tensor"`` is one matrix, the first axis by all others; ``Heads(...)``, ``Repeat`` and lists
    of ``(slice, partition)`` cut its rows. ``Each(...)`` around these says that the first axis
    counts matrices, ``Transposed(...)`` that outputs run along the columns.

    Raises:
        TypeError, ValueError: no partition, one that does not cut matrices, or that does not fit.
    """
    whole = partition = parse(partition)
    banks = 0
    while isinstance(partition, Each):
        partition, banks = partition.partition, banks + 1
    if len(shape) < banks + 2:
        raise ValueError(f"shape {tuple(shape)} has too few axes for matrices of {whole!r}")
    transposed = isinstance(partition, Transposed)
    _check(partition.partition if isinstance(partition, Transposed) else partition, whole)
    inner = prod(shape[banks + 1 :])
    found = []
    for region in resolve(whole, shape):
        for block in range(region.blocks):
            offset = region.offset + block * region.group
            if transposed:
                found.append(Matrix(offset, region.rows, region.group, region.stride, True))
            else:
                found.append(Matrix(offset, region.group // inner, inner, inner, False))
    return tuple(found)


def _check(partition: Partition, whole: Partition) -> None:
    if isinstance(partition, Slices):
        for inner in partition.partitions:
            _check(inner, whole)
    elif isinstance(partition, Repeat):
        _check(partition.partition, whole)
    elif not (isinstance(partition, Heads) or partition == "tensor"):
        raise ValueError(
            f"partition {whole!r} does not cut matrices: expected 'tensor', Heads, Repeat or a "
            "list of (slice, partition) of these, inside Transposed or Each if need be"
        )
