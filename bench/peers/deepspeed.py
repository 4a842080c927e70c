"""DeepSpeed's CPU Adam. It compiles its C++ on first use (minutes) and needs ninja and g++."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer


def _find_ninja() -> None:
    """Let the build see this environment's ninja when the environment is not activated."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"


def adamw() -> list[OptimizerPeer]:
    """``DeepSpeedCPUAdam`` in AdamW mode, states in fp32 or in the parameter's dtype."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _find_ninja()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        full = state_dtype == torch.float32
        return DeepSpeedCPUAdam(params, **options, adamw_mode=True, fp32_optimizer_states=full)

    return [OptimizerPeer("DeepSpeed", build)]
