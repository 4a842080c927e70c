"""apex's fused Adam, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer


def adamw_gpu() -> list[OptimizerPeer]:
    """``FusedAdam`` in AdamW mode; the lab refuses it where its states have another dtype."""
    from apex.optimizers import FusedAdam

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        return FusedAdam(params, **options, adam_w_mode=True)

    return [OptimizerPeer("apex", build)]
