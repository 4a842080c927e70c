"""The adam-mini package, by the authors of Adam-mini."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import NamedOptimizerPeer, require_parameter_dtype

Named = list[tuple[str, Parameter]]


def blockwise_adam() -> list[NamedOptimizerPeer]:
    """``Adam_mini``, told GPT-2 small's width and heads; it takes blocks from names."""
    from adam_mini import Adam_mini

    def build(named: Named, state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype([p for _, p in named], state_dtype)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every parameter
            return Adam_mini(named, **options, dim=768, n_heads=12, verbose=False)

    return [NamedOptimizerPeer("adam-mini", build)]
