"""flashoptim's AdamW, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer


def adamw_gpu() -> list[OptimizerPeer]:
    """``FlashAdamW`` as it comes; its options and states differ from version to version."""
    from flashoptim import FlashAdamW

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        return FlashAdamW(params, **options)

    return [OptimizerPeer("flashoptim", build)]
