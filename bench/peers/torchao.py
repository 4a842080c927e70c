"""torchao's AdamW without quantisation, which torch.compile turns into C++ once per shape."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import OptimizerPeer, require_parameter_dtype

_MOST_SHAPES = 2  # each is compiled for seconds, once per dtype and thread count
_MOST_TENSORS = 1000  # each costs half a millisecond of torch.compile's dispatch


def adamw() -> list[OptimizerPeer]:
    """``torchao.optim._AdamW``, the base of its 8-bit and 4-bit classes."""
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from torchao.optim import _AdamW

    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype(params, state_dtype)
        shapes = len({(param.shape, param.stride()) for param in params})
        if shapes > _MOST_SHAPES:
            raise NotImplementedError(
                f"left out: it compiles once per shape, and here are {shapes}"
            )
        if len(params) > _MOST_TENSORS:
            raise NotImplementedError(
                f"left out: half a millisecond for each of {len(params)} tensors"
            )
        return _AdamW(params, **options)

    return [OptimizerPeer("torchao", build)]
