"""A small byte-level GPT, and real text that every machine has: the standard library's sources."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Single-file modules of every supported Python. Whole modules are held out, so that validation
# text shares no file with training text.
TRAIN_MODULES = (
    "argparse calendar cmd codecs configparser contextlib copy csv dataclasses dis doctest enum "
    "fractions ftplib functools gettext heapq imaplib inspect ipaddress locale mailbox mimetypes "
    "optparse os pdb pickle pickletools platform plistlib pprint pstats pydoc random shutil "
    "smtplib socket subprocess tarfile textwrap threading tokenize traceback typing uuid"
)
VALIDATION_MODULES = "bdb difflib statistics tempfile weakref"


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults learn visibly in a minute on two CPU cores."""

    layers: int = 2
    heads: int = 4
    width: int = 256
    context: int = 64
    vocabulary: int = 256


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864).

    Learned positions need far longer than this demo runs to say which byte came just before.
    """

    turns: Tensor  # (context, 1, 1, head_width / 2), complex: the rotation of each pair of values

    def __init__(self, head_width: int, context: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.outer(torch.arange(context), frequencies)[:, None, None]
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x``, shape ``(batch, time, ..., heads, head_width)``, by its positions."""
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(-2)


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a four times wider MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.rotate = RotaryPositions(width // config.heads, config.context)
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention of ``x``, shape ``(batch, time, width)``."""
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k = self.rotate(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.attention_out(y.transpose(1, 2).reshape(batch, time, width))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream ``x``."""
        x = x + self.attend(self.norm_attention(x))
        mlp: Tensor = self.mlp_out(nn.functional.gelu(self.mlp_in(self.norm_mlp(x))))
        return x + mlp


class GPT(nn.Module):
    """Decoder-only transformer over bytes, with rotary positions and an untied head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's initialization, with wider embeddings, which a short run learns from sooner."""
        for name, parameter in self.named_parameters():
            if name == "token_embedding.weight":
                nn.init.normal_(parameter, std=0.2)
            elif name.endswith(("attention_out.weight", "mlp_out.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every next byte: ``(batch, time)`` to ``(batch, time, vocabulary)``."""
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean next-byte cross-entropy of ``(batch, context + 1)`` windows, in nats per byte."""
        logits = self(windows[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def describe(self) -> str:
        """The model's sizes in one line."""
        c = self.config
        millions = self.parameter_count() / 1e6
        return f"{c.layers}-layer byte-level GPT, width {c.width}, {millions:.2f}M parameters"

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())


def read_modules(names: str) -> Tensor:
    """The sources of standard library modules, end to end, one byte per int64."""
    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join((library / f"{name}.py").read_bytes() for name in names.split())
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def random_windows(text: Tensor, shape: tuple[int, int], length: int, seed: int) -> Tensor:
    """Random windows of ``length`` bytes, as a ``(*shape, length)`` tensor fixed by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length + 1, shape, generator=generator)
    return text[starts[..., None] + torch.arange(length)]
