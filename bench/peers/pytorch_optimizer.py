"""pytorch_optimizer's AdamMini."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from bench.peers import NamedOptimizerPeer, require_parameter_dtype

Named = list[tuple[str, Parameter]]


class _Model(nn.Module):
    """What AdamMini wants to see: something with named parameters."""

    def __init__(self, named: Named) -> None:
        super().__init__()
        self._named = named

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._named)


def blockwise_adam() -> list[NamedOptimizerPeer]:
    """``AdamMini``, told GPT-2 small's width and heads."""
    from pytorch_optimizer import AdamMini

    def build(named: Named, state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype([p for _, p in named], state_dtype)
        return AdamMini(_Model(named), **options, num_embeds=768, num_heads=12)

    return [NamedOptimizerPeer("pytorch_optimizer", build)]
