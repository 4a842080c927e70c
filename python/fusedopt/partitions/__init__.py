"""Partitions of tensors into blocks of coordinates, each with one second moment.

``"coordinate" | "tensor" | "row" | "column" | "global"``, ``Heads(n=... | head_dim=...)``,
``Contiguous(n)``, or a list of ``(slice, partition)`` along axis 0 for fused weights; and
``Transposed``, ``Each`` and ``Repeat`` of these. Rows run along axis 0: the rows of a 1-D tensor
are its coordinates, those of a convolution its output channels.

``adam_mini(model)`` derives the partitions of a torch model's parameters, and
``state_bytes(model)`` says what they save.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fusedopt.partitions.kinds import (
    Contiguous,
    Each,
    Heads,
    Partition,
    Repeat,
    Transposed,
    from_data,
    parse,
    per_tensor,
    to_data,
)
from fusedopt.partitions.pieces import Matrix, matrices
from fusedopt.partitions.regions import Region, block_count, block_ids, resolve

if TYPE_CHECKING:
    from fusedopt.partitions.memory import state_bytes
    from fusedopt.partitions.modules import adam_mini

_NEEDS_TORCH = {  # partitions themselves do not
    "adam_mini": "fusedopt.partitions.modules",
    "state_bytes": "fusedopt.partitions.memory",
}

__all__ = [
    "Contiguous",
    "Each",
    "Heads",
    "Matrix",
    "Partition",
    "Region",
    "Repeat",
    "Transposed",
    "adam_mini",
    "block_count",
    "block_ids",
    "from_data",
    "matrices",
    "parse",
    "per_tensor",
    "resolve",
    "state_bytes",
    "to_data",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'fusedopt.partitions' has no attribute {name!r}")
