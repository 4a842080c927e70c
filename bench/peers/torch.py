"""torch's own optimizers: the plain loop, the foreach and the fused one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import NamedOptimizerPeer, OptimizerPeer, require_parameter_dtype


def _adamw(name: str, **mode: Any) -> OptimizerPeer:
    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype(params, state_dtype)
        return torch.optim.AdamW(params, **options, **mode)

    return OptimizerPeer(f"torch {name}", build)


def adamw() -> list[OptimizerPeer]:
    """``torch.optim.AdamW`` in its three implementations."""
    return [
        _adamw("loop", foreach=False),
        _adamw("foreach", foreach=True),
        _adamw("fused", fused=True),
    ]


def blockwise_adam() -> list[NamedOptimizerPeer]:
    """Its fused AdamW, for scale."""
    peer = _adamw("fused", fused=True)
    return [
        NamedOptimizerPeer(peer.name, lambda named, *rest: peer.build([p for _, p in named], *rest))
    ]
