"""Adam-mini's partitions, read off a torch model's modules."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fusedopt.partitions import attention
from fusedopt.partitions.attention import UnknownError
from fusedopt.partitions.kinds import Each, Heads, Partition, Transposed, parse
from fusedopt.partitions.regions import resolve

Path = Sequence[tuple[str, nn.Module]]  # names and modules from the root to a parameter's owner


def adam_mini(
    model: nn.Module, overrides: Mapping[str, Partition] | None = None
) -> dict[str, Partition]:
    """The partition of every parameter as Adam-mini prescribes, by name.

    Queries and keys by head; values, attention outputs, MLPs, convolutions and experts by output
    neuron; embeddings and the LM head by token; norms whole; biases by coordinate, and so other
    vectors (gains, decays), of which Adam-mini does not speak. Fused weights fall into slices.
    Heads are counted from what the attention module or its config states; shared parameters appear
    once, under the name that ``model.named_parameters()`` gives them. Use::

        partition = fusedopt.partitions.adam_mini(model)
        optimizer = fusedopt.optim.BlockwiseAdam(model.named_parameters(), partition=partition)

    Args:
        model: any module.
        overrides: partitions by parameter name or shell-style pattern (``"*.c_attn.weight"``), for
            what can't be classified, or to decide otherwise. A name goes before a pattern, an
            earlier pattern before a later one.

    Returns:
        Parameter name to partition, without frozen parameters that can't be classified.

    Raises:
        ValueError: parameters that can't be classified, all of them by name with the module's type,
            the shape and the reason; an override that matches nothing or does not fit a shape.

    Source: Zhang et al., arXiv:2406.16793. Its released code splits by names and by
    ``dim * dim // n_heads``; this does neither.
    """
    given = {pattern: parse(partition) for pattern, partition in (overrides or {}).items()}
    unused = set(given)
    result: dict[str, Partition] = {}
    unknown: dict[str, str] = {}
    uses = uses_of(model)
    for name, parameter in model.named_parameters():
        if (pattern := override_of(name, given)) is not None:
            unused.discard(pattern)
            resolve(given[pattern], parameter.shape)
            result[name] = given[pattern]
            continue
        try:
            result[name] = _agreed(uses[parameter], parameter)
        except UnknownError as why:
            if parameter.requires_grad:
                unknown[name] = line_of(uses[parameter][0][0], parameter, str(why))
    if unused:
        raise ValueError(f"overrides {sorted(unused)} match no parameter of {type(model).__name__}")
    if unknown:
        raise ValueError(_question(model, unknown))
    return result


def uses_of(model: nn.Module) -> dict[Tensor, list[tuple[Path, str]]]:
    """Every parameter with all places that hold it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[Tensor, list[tuple[Path, str]]] = {}
    for name, module in modules.items():
        parts = name.split(".") if name else []
        path = [("", model)]
        path += [(part, modules[".".join(parts[: i + 1])]) for i, part in enumerate(parts)]
        for leaf, parameter in module.named_parameters(recurse=False):
            uses.setdefault(parameter, []).append((path, leaf))
    return uses


def override_of(name: str, given: Mapping[str, Partition]) -> str | None:
    """The key of ``given``, a name or a pattern, that a parameter's name matches."""
    if name in given:
        return name
    return next((pattern for pattern in given if fnmatch.fnmatchcase(name, pattern)), None)


def _agreed(uses: Sequence[tuple[Path, str]], parameter: Tensor) -> Partition:
    found = [parse(classify(path, leaf, parameter)) for path, leaf in uses]
    regions = []
    for partition in found:
        try:
            regions.append(resolve(partition, parameter.shape))
        except ValueError as error:
            raise UnknownError(str(error)) from None
    if any(r != regions[0] for r in regions):
        raise UnknownError(f"it is shared by uses that ask for {' and '.join(map(repr, found))}")
    return found[0]


def classify(path: Path, leaf: str, parameter: Tensor) -> Partition:
    """Adam-mini's partition of a parameter in one place that holds it."""
    owner = path[-1][1]
    if parameter.numel() <= 1 or "bias" in re.split(r"[_.]", leaf.lower()):
        return "coordinate"
    for rule in _RULES:
        if (partition := rule(path, leaf, parameter)) is not None:
            return partition
    if sum(n > 1 for n in parameter.shape) == 1:
        raise UnknownError("a vector of a module that is no norm, and no bias")
    raise UnknownError(f"{type(owner).__name__} is not known")


def is_norm(owner: nn.Module) -> bool:
    """Whether it is a normalisation, whose parameters are gains and biases."""
    names = [base.__name__.lower() for base in type(owner).__mro__]
    if any(re.search(r"norm(\dd)?$", name) for name in names):
        return True
    flat = all(p.ndim == 1 for p in owner.parameters())
    return flat and any("norm" in name for name in names)


def _norm(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    return "tensor" if is_norm(path[-1][1]) else None


def _layer(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    owner = path[-1][1]
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase)):
        return "row"
    if leaf != "weight":
        return None
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return _transposed_convolution(owner)
    if attention.is_transposed_linear(owner):
        return Transposed(attention.rows_partition(path, *attention.outputs(owner)))
    convolution = isinstance(owner, nn.modules.conv._ConvNd)
    if convolution or is_linear(owner, parameter):
        names = [name for name, _ in path]
        if convolution and attention.role_of(names[-1:]) is None:
            return "row"
        return attention.rows_partition(path, *attention.outputs(owner))
    return None


def is_linear(owner: nn.Module, weight: Tensor) -> bool:
    """Whether it states these outputs and inputs."""
    sizes = (getattr(owner, "out_features", None), getattr(owner, "in_features", None))
    return weight.ndim == 2 and tuple(weight.shape) == sizes


def _transposed_convolution(owner: Any) -> Partition:
    """Output channels run along the second axis, in as many runs as there are groups."""
    channels = Transposed(Heads(n=owner.out_channels // owner.groups))
    if owner.groups == 1:
        return channels
    each = owner.in_channels // owner.groups
    return [(slice(i * each, (i + 1) * each), channels) for i in range(owner.groups)]


def _torch_attention(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    """The weights that an attention module holds itself."""
    owner = path[-1][1]
    if isinstance(owner, nn.MultiheadAttention) and leaf in ("q_proj_weight", "k_proj_weight"):
        return Heads(n=owner.num_heads)
    if isinstance(owner, nn.MultiheadAttention) and leaf == "v_proj_weight":
        return "row"
    if leaf == "in_proj_weight" and parameter.ndim == 2:
        return attention.fused(path, leaf, *parameter.shape)
    if parameter.squeeze().ndim == 1 and attention.is_attention(owner):
        return "coordinate" if attention.heads_of(path) == parameter.numel() else None
    return None


_GAIN = re.compile(r"scale|lambda", re.I)
_LONGEST = 1 << 16  # elements of a vector; what is longer may be many weights in a row


def _vector(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    """One value a feature, head or channel: by coordinate, which is AdamW.

    A module with nothing else than vectors may be a norm under another name, whose gain would be
    one block, unless it is called a scale; a layer's own weight is no vector.
    """
    owner = path[-1][1]
    if sum(n > 1 for n in parameter.shape) != 1 or parameter.numel() > _LONGEST:
        return None
    if type(owner).__module__.startswith("torch.nn.modules") and leaf == "weight":
        return None
    own = list(owner.parameters(recurse=False))
    alone = all(sum(n > 1 for n in p.shape) <= 1 for p in own) and not any(owner.children())
    called = _GAIN.search(leaf) or _GAIN.search(type(owner).__name__)
    return None if alone and not called else "coordinate"


_SCALING = ("_WeightNorm", "_SpectralNorm")  # parametrizations that leave the rows where they are


def _parametrized(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    """What a layer's weight is computed from, by torch.nn.utils.parametrize."""
    if len(path) < 3 or type(path[-1][1]).__name__ != "ParametrizationList":
        return None
    owner: Any = path[-3][1]
    name = path[-1][0]
    steps = [type(step).__name__ for step in path[-1][1].children()]
    if not all(step in _SCALING for step in steps):
        return None
    if parameter.shape == getattr(owner, name).shape:
        return classify(path[:-2], name, parameter)
    return "coordinate" if sum(n > 1 for n in parameter.shape) == 1 else None


_UP = re.compile(r"(gate_up|up|gate|w1|w3|wi|fc1)(_proj)?(_weight)?")
_DOWN = re.compile(r"(down|w2|wo|fc2)(_proj)?(_weight)?")


def is_bank(owner: nn.Module, leaf: str, parameter: Tensor) -> bool:
    """Whether its first axis counts experts' matrices."""
    named = _UP.fullmatch(leaf) or _DOWN.fullmatch(leaf)
    return parameter.ndim == 3 and bool(named or _sizes(owner))


def _experts(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    """A bank of experts' matrices: axis 0 counts experts."""
    owner = path[-1][1]
    if not is_bank(owner, leaf, parameter):
        return None
    transposed = getattr(owner, "is_transposed", None)
    if not isinstance(transposed, bool):
        transposed = _stored_transposed(owner, leaf, parameter)
    return Each(Transposed("row")) if transposed else Each("row")


def _stored_transposed(owner: nn.Module, leaf: str, parameter: Tensor) -> bool:
    sizes = tuple(parameter.shape[1:])
    for stated in _sizes(owner):
        if sizes in (stated, stated[::-1]) and sizes[0] != sizes[1]:
            return sizes != stated
    banks = {name: p.shape[1:] for name, p in owner.named_parameters(recurse=False) if p.ndim == 3}
    ups = [shape for name, shape in banks.items() if _UP.fullmatch(name)]
    downs = [shape for name, shape in banks.items() if _DOWN.fullmatch(name)]
    if ups and len(downs) == 1:
        (width, inner) = downs[0]
        straight = all(b == width and a in (inner, 2 * inner) for a, b in ups)
        crossed = all(a == inner and b in (width, 2 * width) for a, b in ups)
        if straight != crossed:
            return crossed
    raise UnknownError(
        "whether its matrices are stored (outputs, inputs) or transposed can't be told"
    )


def _sizes(owner: nn.Module) -> list[tuple[Any, Any]]:
    """What a bank states as its outputs and inputs."""
    names = (("output_size", "input_size"), ("out_features", "in_features"))
    stated = [(getattr(owner, a, None), getattr(owner, b, None)) for a, b in names]
    return [pair for pair in stated if None not in pair]


def is_router(owner: nn.Module, leaf: str, parameter: Tensor) -> bool:
    """Whether its outputs are experts' scores."""
    named = re.search(r"router|gate|gating", type(owner).__name__, re.I)
    if not named or leaf != "weight" or parameter.ndim != 2:
        return False
    names = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts")
    counts = {attention.stated(owner, (name,)) for name in names}
    rows, columns = parameter.shape
    return rows in counts and columns not in counts


def _router(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    return "row" if is_router(path[-1][1], leaf, parameter) else None


_TOKENS = {"cls", "token", "tokens", "embed", "embedding", "embeddings", "emb"}
_POSITIONS = {"pos", "position", "positions", "positional"}


def is_named_token(leaf: str) -> bool:
    """Whether the name is that of an embedding held as a bare parameter."""
    return bool(_TOKENS & set(re.split(r"[_\d]+", leaf.lower())))


def _tokens(path: Path, leaf: str, parameter: Tensor) -> Partition | None:
    """Embeddings held as bare parameters, with the features on the last axis."""
    positions = bool(_POSITIONS & set(re.split(r"[_\d]+", leaf.lower())))
    if not (is_named_token(leaf) or (positions and parameter.ndim > 1)):
        return None
    shape = parameter.shape
    single = all(n == 1 for n in shape[:-1])
    if not single and not any(shape[-1] in w and shape[-2] not in w for w in _widths(path)):
        raise UnknownError("which of its axes counts tokens can't be told")
    partition: Partition = "tensor" if len(shape) == 1 else "row"
    for _ in shape[2:]:
        partition = Each(partition)
    return partition


def _widths(path: Path) -> Iterator[set[int]]:
    """How many features there may be: as modules and configs around state; as the layers beside
    have outputs, or a head here has; as configs of the model's parts state.
    """
    owner = path[-1][1]
    configs = [getattr(module, "config", None) for _, module in path]
    around = _stated_widths([module for _, module in path] + configs)
    yield around
    yield {attention.outputs(m)[0] for m in owner.children() if attention.has_outputs(m)}
    if attention.is_attention(owner) and (heads := attention.heads_of(path)):
        yield {width // heads for width in around}
    parts = [part for c in configs for part in getattr(c, "__dict__", {}).values()]
    yield _stated_widths([part for part in parts if hasattr(part, "to_dict")])


def _stated_widths(sources: Sequence[Any]) -> set[int]:
    found = {attention.stated(source, (name,)) for source in sources for name in attention.WIDTHS}
    return {width for width in found if width}


_RULES: tuple[Callable[[Path, str, Tensor], Partition | None], ...] = (
    _norm,
    _layer,
    _torch_attention,
    _tokens,
    _router,
    _experts,
    _parametrized,
    _vector,
)


def line_of(path: Path, parameter: Tensor, why: str) -> str:
    """What is known of a parameter that can't be classified, for ``lines_of``."""
    inside = [type(module).__name__ for _, module in path[-2:]]
    return f"({' in '.join(reversed(inside))}, shape {tuple(parameter.shape)}): {why}"


def lines_of(unknown: Mapping[str, str]) -> list[str]:
    """Lines by name as text: parameters that differ only in their layer's number share one."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, line in unknown.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        lines.setdefault((pattern, line), []).append(name)
    return [
        f"  {names[0] if len(names) == 1 else f'{pattern} [{len(names)} of them]'} {line}"
        for (pattern, line), names in lines.items()
    ]


def _question(model: nn.Module, unknown: Mapping[str, str]) -> str:
    text = [f"adam_mini can't tell the partition of {len(unknown)} parameters:"]
    text += lines_of(unknown)
    first = ".".join("*" if part.isdigit() else part for part in next(iter(unknown)).split("."))
    text.append(
        "Pass adam_mini(model, overrides={name or pattern: partition}), such as "
        f'{{"{first}": ...}}; fusedopt.partitions says what partitions there are'
    )
    return "\n".join(text)
