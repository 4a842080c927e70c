"""Which rows of an attention module's weights make up a head.

What a projection is for is read from its name inside the attention module; how many heads it has,
from what that module, or else the nearest config, states, checked against the weight. A fused
projection's order of rows shows nowhere but in the model's code, so it is taken from conventions
of naming and from the classes listed in ``INTERLEAVED``. Anything else raises ``UnknownError``.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fusedopt.partitions.kinds import Heads, Partition, Repeat

_BEFORE = r"(?:to_|w_?|lin_|linear_|proj_|project_|projection_|fc_|dense_|c_)?"
_AFTER = r"(?:_?(?:proj|projection|lin|linear|layer|net|dense|fc|attn|head|global))?"
_ROLES = {
    role: re.compile(pattern)
    for role, pattern in {
        "query": rf"{_BEFORE}(?:q|query|queries){_AFTER}|q_b_proj",
        "key": rf"{_BEFORE}(?:k|key|keys){_AFTER}",
        "value": rf"{_BEFORE}(?:v|value|values){_AFTER}",
        "output": rf"{_BEFORE}(?:o|out|output|post){_AFTER}|proj|c_proj|dense|proj_out"
        "|projection|attention_out",
        "query key value": rf"{_BEFORE}(?:qkv|query_key_value){_AFTER}|c_attn|att_proj|in_proj"
        "|in_proj_weight",
        "key value": rf"{_BEFORE}kv|kv_b_proj",
        "latent": r"q_a_proj",
        "latent key value": r"kv_a_proj_with_mqa",
        "mlp": r"fc_?\d?|c_fc|lin(?:ear)?_?[12]|w[123]|(?:up|gate|down|gate_up)_proj|mlp|ffn?"
        r"|intermediate|feed_?forward|dense_h_to_4h|dense_4h_to_h|\w+_mlp",
    }.items()
}
_HEADED = ("query", "key", "query key value", "key value")
_TOKENS = re.compile(r"w?(?:q|k|qk|kv|qkv)|qkvz|query|queries|keys?|attn|attention")

# Relative positions are projected to keys of their own.
_POSITIONS = re.compile(r"r|rel|relative|pos|position|positions|positional")

# Names under which libraries split the rows into all of Q, then K, then V.
_CONTIGUOUS = re.compile(
    r"(?:to_|w)?qkv(?:_linear|_lin)?|c_attn|att_proj|in_proj_weight|(?:to_|w)?kv"
)
# Attention classes that split differently, or like that under a name that others use otherwise.
CONTIGUOUS = re.compile(r"Phi(3|4Multimodal)\w*Attention")
INTERLEAVED = re.compile(
    r"(GPTNeoX|GPTNeoXJapanese|Bloom|Persimmon)\w*Attention|DisentangledSelfAttention"
)

HEAD_COUNTS = (
    *("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "nheads", "heads"),
    *("n_local_heads", "num_attn_heads"),
)
HEAD_DIMS = (
    *("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim"),
    *("dim_head", "d_head", "d_kv", "dim_per_head", "head_width", "d_k"),
)
WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd", "hidden_dim", "num_features", "dim")
KEY_HEAD_COUNTS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_local_kv_heads"),
    "kv_heads",
)


class UnknownError(Exception):
    """A parameter whose partition can't be told; says why."""


def scope(path: Sequence[tuple[str, nn.Module]]) -> int | None:
    """Where in the path from the root to a layer its attention module stands, if it is in one."""
    for at in range(len(path) - 2, -1, -1):
        if is_attention(path[at][1]):
            return at
    return None


def is_attention(module: nn.Module) -> bool:
    """Whether it is called so or holds a projection to queries or keys."""
    return _called_attention(module) or _has_heads(module)


def role_of(names: Sequence[str]) -> str | None:
    """What the layer at this path below an attention module is for."""
    return _roles(names)[1]


def _roles(names: Sequence[str]) -> tuple[int, str | None]:
    """The last name that tells a role, and the role."""
    for at in range(len(names) - 1, -1, -1):
        for role, pattern in _ROLES.items():
            if pattern.fullmatch(names[at].lower()):
                return at, role
    return -1, None


def sounds_headed(names: Sequence[str]) -> bool:
    """Whether a name on this path speaks of queries, keys or attention."""
    tokens = (token for name in names for token in re.split(r"[_\d]+", name.lower()))
    return any(_TOKENS.fullmatch(token) for token in tokens)


def _has_both(module: nn.Module) -> bool:
    """Whether projections to queries and to keys are told by their names."""
    names = [name for name, _ in module.named_children()]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    roles = {role_of([name]) for name in names}
    return "query key value" in roles or ("query" in roles and bool(roles & {"key", "key value"}))


def _is_neither(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a layer below an attention module gives neither queries nor keys: others do."""
    tokens = {token for name in names for token in re.split(r"[_\d]+", name.lower())}
    spoken = any(_TOKENS.fullmatch(token) or _POSITIONS.fullmatch(token) for token in tokens)
    return _has_both(module) and not spoken


def rows_partition(path: Sequence[tuple[str, nn.Module]], rows: int, columns: int) -> Partition:
    """The partition of a layer's weight along its outputs: by head for queries and keys, else rows.

    Args:
        path: names and modules from the root to the layer.
        rows, columns: outputs and inputs of the layer.

    Raises:
        UnknownError: it is part of attention, and its heads can't be told.
    """
    at = scope(path)
    below = [name for name, _ in path[at + 1 :]] if at is not None else [path[-1][0]]
    if at is None or (not _has_heads(path[at][1]) and _holds_attention(path[at][1])):
        if role_of(below) not in ("output", "mlp") and sounds_headed(below):
            raise UnknownError("its name speaks of attention, but no module around it is one")
        return "row"
    named, role = _roles(below)
    if role is None and _is_neither(path[at][1], below):
        return "row"
    if role is None:
        raise UnknownError(f"its part in {type(path[at][1]).__name__} is unknown")
    if role not in _HEADED and role != "latent key value":
        return "row"
    name, whole = path[at + 1 + named]
    if sum(map(has_outputs, whole.modules())) > 1:
        raise UnknownError(f"it is one of several layers in {name!r}, a projection to {role}")
    return _by_head(_Attention(path[: at + 1]), role, below, rows, columns)


def heads_of(path: Sequence[tuple[str, nn.Module]]) -> int | None:
    """How many heads the attention module at the end of this path states, if it does."""
    return _Attention(path).count


class _Attention:
    """An attention module and what it, or the nearest module or config above, says of heads."""

    def __init__(self, path: Sequence[tuple[str, nn.Module]]) -> None:
        self.module = path[-1][1]
        self.name = type(self.module).__name__
        self.count = self.size = self.key_count = None
        for source, own in _sources(path):
            if not own and (self.count is not None or not self._has_width_of(source)):
                continue  # it may speak of another tower's heads
            if self.size is None and self.count is None:
                self.size = stated(source, HEAD_DIMS)
            self.count = self.count or stated(source, HEAD_COUNTS)
            self.key_count = self.key_count or stated(source, KEY_HEAD_COUNTS)
        groups = stated(self.module, ("num_key_value_groups",))
        if groups and self.count and stated(self.module, KEY_HEAD_COUNTS) is None:
            self.key_count = self.count // groups

    def _has_width_of(self, source: Any) -> bool:
        """Whether ``source`` states the width that enters here, or none at all."""
        widths = {stated(source, (name,)) for name in WIDTHS} - {None}
        entering = self._sizes_of("query") or self._sizes_of("query key value")
        return not widths or entering is None or entering[1] in widths

    def size_for(self, rows: int) -> int:
        """Rows of a head where all the query heads together have ``rows``."""
        count, size = self.count, self.size
        if count is None and size is None:
            raise UnknownError(f"neither {self.name} nor a config says how many heads it has")
        if size is None:
            assert count is not None
            size = rows // count
        if rows % size or (count is not None and count * size != rows):
            heads = f"{count} heads of {size} rows" if count else f"heads of {size} rows"
            raise UnknownError(
                f"{self.name} or its config states {heads}, but there are {rows} rows"
            )
        return size

    def key_size(self, rows: int) -> int:
        """Rows of a head of the keys: as many as of the queries, whose number is theirs or less."""
        queries = self.query_rows()
        size = self.size_for(queries) if queries else self.size or self.size_for(rows)
        if rows % size:
            raise UnknownError(f"{rows} rows of keys are not heads of {size}, as the queries'")
        if self.key_count is not None and rows not in (self.key_count * size, queries):
            raise UnknownError(
                f"{self.name} or its config states {self.key_count} key heads, and {size} rows "
                f"a head, but there are {rows} rows"
            )
        return size

    def query_rows(self) -> int:
        """Rows of the projection to queries alone; 0 if there is none."""
        return (self._sizes_of("query") or (0, 0))[0]

    def joined(self) -> int:
        """How many coordinates of all heads enter the output projection; 0 if there is none."""
        return (self._sizes_of("output") or (0, 0))[1]

    def _sizes_of(self, role: str) -> tuple[int, int] | None:
        for name, child in self.module.named_children():
            if role_of([name]) == role:
                return next((outputs(m) for m in child.modules() if has_outputs(m)), None)
        return None


def has_outputs(module: nn.Module) -> bool:
    """Whether it multiplies by its ``weight``, a matrix or the kernels of a convolution."""
    return getattr(getattr(module, "weight", None), "ndim", 0) >= 2


def outputs(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of such a layer."""
    weight: Any = module.weight
    if is_transposed_linear(module):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight[0].numel()


def is_transposed_linear(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer whose weight is stored (inputs, outputs)."""
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and hasattr(module, "nf") and module.weight.shape[1] == module.nf


def fused(path: Sequence[tuple[str, nn.Module]], name: str, rows: int, columns: int) -> Partition:
    """The partition of an attention module's own fused weight, such as ``in_proj_weight``."""
    return _by_head(_Attention(path), role_of([name]) or "", [name], rows, columns)


def _by_head(
    attention: _Attention, role: str, names: Sequence[str], rows: int, columns: int
) -> Partition:
    if role == "query":
        return Heads(n=rows // attention.size_for(rows))
    if role == "key":
        return Heads(n=rows // attention.key_size(rows))
    if "kv_a_proj_with_mqa" in names or "kv_b_proj" in names:
        return _latent(attention.module, role, rows)
    if role == "key value" or attention.query_rows():
        _require_contiguous(attention, names)
        half = rows // 2
        size = attention.key_size(half) if rows % 2 == 0 else 0
        if not size:
            raise UnknownError(f"its {rows} rows are not as many keys as values")
        return [(slice(0, half), Heads(n=half // size)), (slice(half, rows), "row")]
    return _fused(attention, names, rows, columns)


def _fused(attention: _Attention, names: Sequence[str], rows: int, columns: int) -> Partition:
    module = attention.module
    if re.match(r"CodeGen\w*Attention", attention.name):
        part = rows // 4  # rows lie in 4 shards, each with queries, values, keys
        size = attention.size_for(rows // 3)
        third = part // 3
        headed = Heads(head_dim=size)
        parts = [(slice(0, third), headed), (slice(third, 2 * third), "row")]
        return Repeat(4, [*parts, (slice(2 * third, part), headed)])
    if re.match(r"Falcon\w*Attention", attention.name):
        if getattr(module, "new_decoder_architecture", False):
            return _groups(attention, attention.key_count, rows)
        return _groups(attention, 1 if module.multi_query else attention.count, rows)
    bigcode = re.match(r"GPTBigCode\w*Attention", attention.name)
    if INTERLEAVED.match(attention.name) or (bigcode and not module.multi_query):
        return _groups(attention, attention.count, rows)
    _require_contiguous(attention, names)
    if bigcode:
        return _contiguous(attention, rows, columns, 1)
    return _contiguous(attention, rows, columns, attention.key_count)


def _contiguous(attention: _Attention, rows: int, columns: int, key_count: int | None) -> Partition:
    """All queries, then all keys, then all values."""
    count, size = attention.count, attention.size
    queries = attention.joined() or (columns if rows == 3 * columns else 0)
    if count is None and size is None:
        raise UnknownError(f"neither {attention.name} nor a config says how many heads it has")
    if count is None:
        count = queries // (size or 1)
    if size is None and count and queries:
        size = queries // count
    elif size is None and key_count:
        size = rows // (count + 2 * key_count)
    if not count or not size:
        raise UnknownError(f"{attention.name} does not say how many heads of keys it has")
    keys = (rows - count * size) // 2
    if key_count is None:
        key_count = keys // size
    if rows != count * size + 2 * keys or keys != key_count * size or keys <= 0:
        raise UnknownError(
            f"{attention.name} or its config states {count} heads, {key_count} of keys, of "
            f"{size} rows, but there are {rows} rows"
        )
    return [
        (slice(0, count * size), Heads(n=count)),
        (slice(count * size, count * size + keys), Heads(n=key_count)),
        (slice(count * size + keys, rows), "row"),
    ]


def _groups(attention: _Attention, groups: int | None, rows: int) -> Partition:
    """For each head of keys: its queries' heads, the key's, the value's."""
    count = attention.count
    if not count or not groups or count % groups or rows % (count + 2 * groups):
        raise UnknownError(
            f"{attention.name} or its config states {count} heads in {groups} groups, "
            f"but there are {rows} rows"
        )
    size = rows // (count + 2 * groups)
    if attention.size not in (None, size):
        raise UnknownError(f"{attention.name} states heads of {attention.size} rows, not {size}")
    headed = (count // groups + 1) * size
    parts = [(slice(0, headed), Heads(head_dim=size)), (slice(headed, headed + size), "row")]
    return Repeat(groups, parts)


def _latent(module: nn.Module, role: str, rows: int) -> Partition:
    """Multi-head latent attention: keys and values from a shared latent vector (DeepSeek-V2)."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    rank, rope, nope, value = (stated(module, (name,)) for name in names)
    count = stated(module, HEAD_COUNTS)
    if None in (rank, rope, nope, value, count):
        raise UnknownError(
            f"{type(module).__name__} does not state {', '.join(names)} and its heads"
        )
    assert rank is not None and rope is not None and nope is not None and value is not None
    assert count is not None
    if rows != (rank + rope if role == "latent key value" else count * (nope + value)):
        raise UnknownError(f"its {rows} rows are not those that {type(module).__name__} states")
    if role == "latent key value":  # the rest is one rotary key, shared by all heads
        return [(slice(0, rank), "row"), (slice(rank, rows), "tensor")]
    return Repeat(count, [(slice(0, nope), "tensor"), (slice(nope, nope + value), "row")])


def _require_contiguous(attention: _Attention, names: Sequence[str]) -> None:
    known = CONTIGUOUS.match(attention.name) or re.match(r"GPTBigCode", attention.name)
    if not known and not any(_CONTIGUOUS.fullmatch(name.lower()) for name in names):
        raise UnknownError(f"{attention.name} is not known, nor in which order its rows are fused")


def _called_attention(module: nn.Module) -> bool:
    return any(re.search(r"attention|attn", c.__name__, re.I) for c in type(module).__mro__)


def _has_heads(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    return any(role_of([name]) in _HEADED for name in names if name != "in_proj")


def _holds_attention(module: nn.Module) -> bool:
    return any(is_attention(child) for child in module.modules() if child is not module)


def _sources(path: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[Any, bool]]:
    """What may speak of heads, nearest first, and whether it is the attention module's own."""
    for _, module in reversed(path):
        yield module, module is path[-1][1]
        if (config := getattr(module, "config", None)) is not None:
            yield config, module is path[-1][1]


def stated(source: Any, names: Sequence[str]) -> int | None:
    """The first of these attributes of a module or config that is a positive whole number."""
    for name in names:
        try:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
        except Exception:  # transformers' configs refuse a value that differs by layer
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
