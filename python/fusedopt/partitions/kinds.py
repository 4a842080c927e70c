"""What a partition is: five names, a few frozen classes, and lists of slices; and their plain form.

All are hashable and compare by value once they went through ``parse``, which turns the lists of
``(slice, partition)`` that people write into ``Slices``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, TypeAlias

NAMES = ("coordinate", "tensor", "row", "column", "global")


@dataclass(frozen=True, repr=False)
class Heads:
    """Axis 0 in equal runs of rows, one block each: ``n`` heads, or heads of ``head_dim`` rows."""

    n: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if (self.n is None) == (self.head_dim is None):
            raise ValueError(
                f"Heads got n={self.n!r} and head_dim={self.head_dim!r}, expected exactly one"
            )
        for name in ("n", "head_dim"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _at_least_one(f"Heads: {name}", value))

    def __repr__(self) -> str:
        return f"Heads(n={self.n})" if self.head_dim is None else f"Heads(head_dim={self.head_dim})"


@dataclass(frozen=True, repr=False)
class Contiguous:
    """Runs of ``n`` elements in row-major order; the last one may be shorter."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _at_least_one("Contiguous: n", self.n))

    def __repr__(self) -> str:
        return f"Contiguous({self.n})"


@dataclass(frozen=True, repr=False)
class Transposed:
    """The partition of the matrix's transpose: for weights stored (inputs, outputs).

    An array of more axes counts as the matrix (first axis, all others).
    ``Transposed("row")`` gives each output of Hugging Face's ``Conv1D`` a block.
    """

    partition: "Partition"

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition", parse(self.partition))

    def __repr__(self) -> str:
        return f"Transposed({self.partition!r})"


@dataclass(frozen=True, repr=False)
class Each:
    """Axis 0 counts arrays, each with this partition: for banks of experts."""

    partition: "Partition"

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition", parse(self.partition))

    def __repr__(self) -> str:
        return f"Each({self.partition!r})"


@dataclass(frozen=True, repr=False)
class Repeat:
    """Axis 0 in ``n`` equal parts, each with this partition: for rows interleaved by head."""

    n: int
    partition: "Partition"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _at_least_one("Repeat: n", self.n))
        object.__setattr__(self, "partition", parse(self.partition))

    def __repr__(self) -> str:
        return f"Repeat({self.n}, {self.partition!r})"


@dataclass(frozen=True, repr=False)
class Slices:
    """A list of ``(slice, partition)`` along axis 0, hashable: what ``parse`` makes of such a list.

    ``stops[i]`` is where the i-th slice ends and the next begins; the last may be None, the end.
    """

    stops: tuple[int | None, ...]
    partitions: tuple["Partition", ...]

    def __repr__(self) -> str:
        starts = (0, *self.stops[:-1])
        parts = zip(starts, self.stops, self.partitions, strict=True)
        return f"[{', '.join(f'(slice({a}, {b}), {p!r})' for a, b, p in parts)}]"


Partition: TypeAlias = (
    str | Heads | Contiguous | Transposed | Each | Repeat | Slices | Sequence[tuple[slice, Any]]
)
KINDS = (Heads, Contiguous, Transposed, Each, Repeat, Slices)
WANTED = (
    f"one of {', '.join(map(repr, NAMES))}, Heads(n=... or head_dim=...), Contiguous(n), "
    "Transposed(...), Each(...), Repeat(n, ...) or a list of (slice, partition)"
)


def parse(partition: Any) -> Partition:
    """The hashable form of a partition: itself, or ``Slices`` for a list of slices.

    Raises:
        TypeError, ValueError: it is none; the message says what came and what was wanted.
    """
    if isinstance(partition, KINDS) or (isinstance(partition, str) and partition in NAMES):
        return partition
    if isinstance(partition, str):
        raise ValueError(f"partition is {partition!r}, expected {WANTED}")
    if not isinstance(partition, (list, tuple)):
        raise TypeError(f"partition is {partition!r}, expected {WANTED}")
    return _parse_slices(partition)


def _parse_slices(parts: Sequence[Any]) -> Slices:
    if not parts:
        raise ValueError("partition is an empty list, expected (slice, partition) entries")
    stops: list[int | None] = []
    partitions = []
    end: int | None = 0
    for i, part in enumerate(parts):
        if not (isinstance(part, (list, tuple)) and len(part) == 2 and isinstance(part[0], slice)):
            raise TypeError(f"partition[{i}] is {part!r}, expected (slice, partition)")
        piece, inner = part
        if piece.step not in (None, 1):
            raise ValueError(f"partition[{i}]: {piece} has a step, expected rows without gaps")
        start = 0 if piece.start is None else index(piece.start)
        if start != end:
            wanted = "no slice after one without an end" if end is None else f"start {end}"
            raise ValueError(f"partition[{i}]: {piece} starts at {start}, expected {wanted}")
        end = None if piece.stop is None else index(piece.stop)
        if end is not None and end < start:
            raise ValueError(f"partition[{i}]: {piece} ends before it starts; count from 0")
        stops.append(end)
        partitions.append(parse(inner))
    return Slices(tuple(stops), tuple(partitions))


def per_tensor(partitions: Any, count: int) -> list[Partition]:
    """One parsed partition for each of ``count`` tensors, from one for all or a list of as many.

    A list of ``(slice, partition)`` is one partition.
    """
    if isinstance(partitions, (str, *KINDS)) or is_slices(partitions):
        return [parse(partitions)] * count
    if not isinstance(partitions, Sequence):
        raise TypeError(f"partitions is {partitions!r}, expected {WANTED}, or a list of these")
    if len(partitions) != count:
        raise ValueError(
            f"partitions has {len(partitions)} entries, expected one partition, "
            f"or {count}: one a tensor"
        )
    result = []
    for i, partition in enumerate(partitions):
        try:
            result.append(parse(partition))
        except (TypeError, ValueError) as error:
            raise type(error)(f"partitions[{i}]: {error}") from None
    return result


def is_slices(value: Any) -> bool:
    """Whether this is a list of ``(slice, partition)``, the one partition that is a list."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(part, (list, tuple)) and len(part) > 0 and isinstance(part[0], slice)
        for part in value
    )


def to_data(partition: Any) -> Any:
    """The partition as str, int, list and dict alone, for checkpoints (``weights_only=True``)."""
    partition = parse(partition)
    if isinstance(partition, str):
        return partition
    if isinstance(partition, Slices):
        return [
            {"stop": stop, "partition": to_data(inner)}
            for stop, inner in zip(partition.stops, partition.partitions, strict=True)
        ]
    data: dict[str, Any] = {"kind": type(partition).__name__}
    for name, value in vars(partition).items():
        if value is not None:
            data[name] = to_data(value) if name == "partition" else value
    return data


def from_data(data: Any) -> Partition:
    """The partition that ``to_data`` described.

    Raises:
        TypeError, ValueError: the data describes none.
    """
    if isinstance(data, list) and all(isinstance(part, dict) for part in data):
        starts = [0, *(part.get("stop") for part in data[:-1])]
        return parse(
            [
                (slice(start, part.get("stop")), from_data(part.get("partition")))
                for start, part in zip(starts, data, strict=True)
            ]
        )
    if not isinstance(data, dict):
        return parse(data)
    fields: dict[str, Any] = {key: value for key, value in data.items() if key != "kind"}
    if "partition" in fields:
        fields["partition"] = from_data(fields["partition"])
    for kind in (Heads, Contiguous, Transposed, Each, Repeat):
        if kind.__name__ == data.get("kind"):
            return kind(**fields)
    raise ValueError(f"{data!r} describes no partition, expected what to_data returns")


def _at_least_one(name: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number >= 1")
    return number
