"""How many bytes of state each optimizer keeps for a model."""

from collections.abc import Mapping

import torch
from torch import nn

from fusedopt.optim._state import dtype_of
from fusedopt.partitions.kinds import Partition
from fusedopt.partitions.modules import adam_mini
from fusedopt.partitions.regions import block_count

STEP = torch.float32.itemsize  # every parameter has a counter of its steps


class StateBytes(dict[str, int]):
    """Optimizer's name to bytes; prints as a table with the share of AdamW's."""

    def __str__(self) -> str:
        rows = (
            f"{name:<16}{size:>16,} bytes{size / (self['AdamW'] or 1):>8.3f}"
            for name, size in self.items()
        )
        return "\n".join(rows)


def state_bytes(
    model: nn.Module,
    partition: Partition | Mapping[str, Partition] | None = None,
    *,
    state_dtype: torch.dtype | None = None,
) -> StateBytes:
    """Bytes of optimizer state for a model, once every trainable parameter has made a step::

        print(fusedopt.partitions.state_bytes(model))
        # AdamW              995,519,056 bytes   1.000
        # BlockwiseAdam      498,632,824 bytes   0.501

    Args:
        model: any module, also on the meta device; frozen parameters have no state.
        partition: one for all, or by parameter name; None takes ``adam_mini(model)``.
        state_dtype: as the optimizers' argument; ``block_sq`` is float32 in any case.

    Returns:
        ``{"AdamW": ..., "BlockwiseAdam": ...}``: the elements of the state tensors, step counters
        included. What alignment adds between small tensors is not counted.

    Raises:
        ValueError: a parameter without a partition, or one that does not fit.
    """
    if partition is None:
        partition = adam_mini(model)
    adamw = blockwise = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moment = parameter.numel() * dtype_of(parameter, state_dtype).itemsize
        adamw += 2 * moment + STEP
        blocks = block_count(_of(name, partition), parameter.shape)
        blockwise += moment + blocks * torch.float32.itemsize + STEP
    return StateBytes(AdamW=adamw, BlockwiseAdam=blockwise)


def _of(name: str, partition: Partition | Mapping[str, Partition]) -> Partition:
    if not isinstance(partition, Mapping):
        return partition
    if name not in partition:
        raise ValueError(f"partition has no entry for parameter {name!r}")
    return partition[name]
