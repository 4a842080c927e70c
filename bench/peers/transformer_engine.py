"""TransformerEngine's fused Adam, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer


def adamw_gpu() -> list[OptimizerPeer]:
    """``FusedAdam`` in AdamW mode, without master weights."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        dtypes = {"exp_avg_dtype": state_dtype, "exp_avg_sq_dtype": state_dtype}
        return FusedAdam(params, **options, adam_w_mode=True, **dtypes)

    return [OptimizerPeer("TransformerEngine", build)]
