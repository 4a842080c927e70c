"""Ours, through the same door as the peers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import NamedOptimizerPeer, OptimizerPeer


def adamw() -> list[OptimizerPeer]:
    """``fusedopt.optim.AdamW`` as a user makes it."""
    from fusedopt.optim import AdamW

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        if params[0].dtype == state_dtype:
            return AdamW(params, **options)
        return AdamW(params, **options, state_dtype=state_dtype)

    return [OptimizerPeer("fusedopt", build)]


def blockwise_adam() -> list[NamedOptimizerPeer]:
    """Our AdamW, for scale."""
    [peer] = adamw()
    return [
        NamedOptimizerPeer(
            "fusedopt AdamW", lambda named, *rest: peer.build([p for _, p in named], *rest)
        )
    ]
