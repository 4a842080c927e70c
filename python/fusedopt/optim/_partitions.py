"""Partitions in parameter groups: one per parameter, plain data in checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fusedopt import partitions
from fusedopt.partitions import Partition


def one_each(group: dict[str, Any], fits: Callable[[Partition, Any], Any]) -> list[Partition]:
    """The partition of each parameter of a group; ``fits(partition, shape)`` checks it.

    ``group["partition"]`` is one for all, a mapping from parameters or names, or a function.
    """
    params: list[Tensor] = group["params"]
    kinds = [_partition_of(group, i) for i in range(len(params))]
    for i, (p, kind) in enumerate(zip(params, kinds, strict=True)):
        try:
            fits(kind, p.shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name_of(group, i)}: {error}") from None
    return kinds


def _partition_of(group: dict[str, Any], i: int) -> Partition:
    given, p = group["partition"], group["params"][i]
    if isinstance(given, Mapping):
        keys = [p, group["param_names"][i]] if "param_names" in group else [p]
        found = [given[key] for key in keys if key in given]
        if not found:
            raise ValueError(
                f"{name_of(group, i)}: the mapping of partitions has no entry for it; it goes by "
                "parameter, or by name where params are named_parameters()"
            )
        return partitions.parse(found[0])
    return partitions.parse(given(p) if callable(given) else given)


def name_of(group: dict[str, Any], i: int) -> str:
    """How messages call a group's parameter."""
    name = f" {group['param_names'][i]!r}" if "param_names" in group else ""
    return f"parameter {i}{name} (shape {tuple(group['params'][i].shape)})"


def to_data(saved: dict[str, Any]) -> None:
    """Turn the partitions in a ``state_dict`` into plain data."""
    for group in saved["param_groups"]:
        if "partition" in group:
            group["partition"] = [partitions.to_data(p) for p in group["partition"]]


def put_in_own(
    param_groups: list[dict[str, Any]], loaded: dict[str, Any], required: bool = True
) -> dict[str, Any]:
    """Check that a checkpoint's partitions are this optimizer's, and put these in.

    A group without any is refused if they are ``required``, else it gets this optimizer's.
    """
    groups = []
    for index, group in enumerate(loaded["param_groups"]):
        groups.append({**group})
        if index >= len(param_groups) or "partition" not in param_groups[index]:
            continue  # torch refuses the former
        own = param_groups[index]["partition"]
        saved = group.get("partition", [None] * len(group["params"]))
        if len(saved) != len(own):  # torch refuses it
            continue
        for i, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
            if theirs != partitions.to_data(ours) and (required or theirs is not None):
                name = "no partition" if theirs is None else repr(partitions.from_data(theirs))
                raise ValueError(
                    f"param_groups[{index}]['params'][{i}]: the checkpoint was saved with "
                    f"partition {name}, but this optimizer has {ours!r}"
                )
        groups[-1]["partition"] = own
    loaded["param_groups"] = groups
    return loaded
