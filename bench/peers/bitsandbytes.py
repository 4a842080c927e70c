"""bitsandbytes' 32-bit AdamW on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer


def adamw() -> list[OptimizerPeer]:
    """``AdamW32bit``: states in fp32 whatever the parameters."""
    from bitsandbytes.optim.adamw import AdamW32bit

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        if state_dtype != torch.float32:
            raise NotImplementedError("its states are fp32")
        return AdamW32bit(params, **options)

    return [OptimizerPeer("bitsandbytes", build, first="state1", second="state2")]
