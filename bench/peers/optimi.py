"""optimi's AdamW, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer, require_parameter_dtype


def adamw_gpu() -> list[OptimizerPeer]:
    """``optimi.AdamW`` without Kahan summation, in its default implementation."""
    from optimi import AdamW

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype(params, state_dtype)
        return AdamW(params, **options, kahan_sum=False)

    return [OptimizerPeer("optimi", build)]
