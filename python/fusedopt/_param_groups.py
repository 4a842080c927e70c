"""Which parameters of a model Muon trains, and which AdamW, read off the model's modules."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusedopt.partitions import attention, modules
from fusedopt.partitions.attention import UnknownError
from fusedopt.partitions.kinds import Each, Heads, Partition, Repeat, Slices, Transposed, parse
from fusedopt.partitions.pieces import matrices

SPLITS = ("none", "fused", "heads")
# Output layers by name, outside of the numbered layers of a model, whose own have such names too.
_HEAD = re.compile(
    r"(lm_|mlm_|qa_)?heads?|embed_out|unembed\w*|outputs?|output_(layer|proj|projection)"
    r"|(to_)?logits\w*|vocab_\w*|score|classifier|qa_outputs|generator"
)


def param_groups_for(
    model: nn.Module,
    *,
    split: str = "fused",
    overrides: Mapping[str, Partition] | None = None,
    muon: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for ``optim.Muon`` and ``optim.NorMuon``::

        optimizer = fusedopt.optim.Muon(fusedopt.param_groups_for(model), lr=0.02)

    Hidden matrices (linear layers, attention's projections, convolutions, banks of experts,
    routers) go to Muon; embeddings, the output layer, also one tied to an embedding, gains, biases
    and depthwise convolutions to AdamW. Frozen parameters are left out.

    Args:
        model: any module.
        split: ``"none"``: a layer's weight is one matrix. ``"fused"``: fused projections to
            queries, keys and values are cut into these, where the order of their rows is known.
            ``"heads"``: queries and keys by head too. What is not known stays whole. Banks of
            experts are cut into experts and grouped convolutions into groups in any case.
        overrides: by parameter name or shell-style pattern, ``"adamw"``, ``"muon"`` (whole) or a
            partition (``fusedopt.partitions.matrices``), for what can't be classified, or to decide
            otherwise. A name goes before a pattern, an earlier pattern before a later one.
        muon, adamw: options of the group.

    Returns:
        The group of Muon, with its ``partition``, then that of AdamW, each if it has parameters.

    Raises:
        ValueError: parameters that can't be classified, all of them by name with the module's type
            and shape; an override that matches nothing or does not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    given = dict(overrides or {})
    unused = set(given)
    uses = modules.uses_of(model)
    kinds: dict[Tensor, Partition] = {}
    others: list[Tensor] = []
    unknown: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        pattern = modules.override_of(name, given)
        unused.discard(pattern or "")
        if not parameter.requires_grad:
            continue
        try:
            kind = (
                _kind(model, uses[parameter], parameter, split)
                if pattern is None
                else _asked_for(given[pattern], name, parameter)
            )
        except UnknownError as why:
            unknown[name] = modules.line_of(uses[parameter][0][0], parameter, str(why))
            continue
        if kind is None:
            others.append(parameter)
        else:
            kinds[parameter] = kind
    if unused:
        raise ValueError(f"overrides {sorted(unused)} match no parameter of {type(model).__name__}")
    if unknown:
        raise ValueError(
            f"param_groups_for can't tell what {len(unknown)} parameters are:\n"
            + "\n".join(modules.lines_of(unknown))
            + "\nPass overrides={name or pattern: 'adamw', 'muon' or a partition}"
        )
    groups: list[dict[str, Any]] = []
    if kinds:
        partition = list(kinds.values())
        by_parameter = dict(zip(kinds, partition, strict=True))
        groups.append(
            {**(muon or {}), "params": list(kinds), "algorithm": "muon", "partition": by_parameter}
        )
    if others:
        groups.append({**(adamw or {}), "params": others, "algorithm": "adamw"})
    return groups


def _asked_for(wanted: Partition, name: str, parameter: Tensor) -> Partition | None:
    if wanted == "adamw":
        return None
    kind = "tensor" if wanted == "muon" else parse(wanted)
    try:
        matrices(kind, parameter.shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"overrides[{name!r}]: {error}") from None
    return kind


def _kind(
    model: nn.Module, uses: list[tuple[modules.Path, str]], parameter: Tensor, split: str
) -> Partition | None:
    """The partition for Muon; None: AdamW's."""
    if sum(size > 1 for size in parameter.shape) < 2 and _is_vector(uses, parameter):
        return None
    found = [_kind_of_use(model, path, leaf, parameter, split) for path, leaf in uses]
    if None in found:  # tied to an embedding or the output layer
        return None
    return found[0] if all(kind == found[0] for kind in found) else _whole(uses[0], parameter)


def _is_vector(uses: list[tuple[modules.Path, str]], parameter: Tensor) -> bool:
    """One axis, or a matrix with one row or column that no layer multiplies by."""
    return parameter.ndim < 2 or not all(
        attention.has_outputs(path[-1][1]) and leaf == "weight" for path, leaf in uses
    )


def _kind_of_use(
    model: nn.Module, path: modules.Path, leaf: str, parameter: Tensor, split: str
) -> Partition | None:
    owner = path[-1][1]
    if (
        isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
        or "bias" in re.split(r"[_.]", leaf.lower())
        or modules.is_norm(owner)
        or _is_output_layer(model, path)
    ):
        return None
    if isinstance(owner, nn.modules.conv._ConvNd) and leaf == "weight":
        return _convolution(owner, parameter)
    if not _is_matrix(owner, leaf, parameter):
        if modules.is_named_token(leaf):
            return None
        raise UnknownError(f"{type(owner).__name__} is not known")
    whole = _whole((path, leaf), parameter)
    if split == "none" and not isinstance(whole, Each):
        return whole
    try:
        return _cut(parse(modules.classify(path, leaf, parameter)), split == "heads")
    except UnknownError:
        if parameter.ndim == 3:  # whether a bank's matrices are transposed matters
            raise
        return whole


def _is_matrix(owner: Any, leaf: str, parameter: Tensor) -> bool:
    if isinstance(owner, nn.RNNBase):
        return True
    if isinstance(owner, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return True
    if leaf == "weight" and (
        attention.is_transposed_linear(owner) or modules.is_linear(owner, parameter)
    ):
        return True
    return modules.is_bank(owner, leaf, parameter) or modules.is_router(owner, leaf, parameter)


def _whole(use: tuple[modules.Path, str], parameter: Tensor) -> Partition:
    path, _ = use
    if attention.is_transposed_linear(path[-1][1]):
        return Transposed("tensor")
    return Each("tensor") if parameter.ndim == 3 else "tensor"


def _convolution(owner: Any, parameter: Tensor) -> Partition | None:
    if owner.groups == 1:
        return "tensor"
    depthwise = parameter.shape[1] == 1 or parameter.shape[0] == owner.groups
    return None if depthwise else Heads(n=owner.groups)


def _is_output_layer(model: nn.Module, path: modules.Path) -> bool:
    owner = path[-1][1]
    stated = getattr(model, "get_output_embeddings", None)
    if stated is not None and stated() is owner:
        return True
    names = [name for name, _ in path[1:]]
    if not names or not isinstance(owner, nn.Linear) or attention.scope(path) is not None:
        return False
    if any(name.isdigit() for name in names):
        return False
    return bool(_HEAD.fullmatch(names[-1].lower())) or names == ["fc"]


def _cut(partition: Partition, heads: bool) -> Partition:
    """Adam-mini's blocks as matrices: heads, if asked for, and the parts of fused weights."""
    if isinstance(partition, Heads):
        return partition if heads else "tensor"
    if isinstance(partition, Transposed):
        return Transposed(_cut(partition.partition, heads))
    if isinstance(partition, Each):
        return Each(_cut(partition.partition, heads))
    if isinstance(partition, Repeat):  # rows interleaved by head
        return Repeat(partition.n, _cut(partition.partition, heads)) if heads else "tensor"
    if isinstance(partition, Slices):
        return Slices(partition.stops, tuple(_cut(p, heads) for p in partition.partitions))
    return "tensor"
