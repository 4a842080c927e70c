"""Sinkhorn-Knopp in autograd's graph."""

from typing import Any

import torch


class Knopp(torch.autograd.Function):
    """The iterations; backward runs them again."""

    @staticmethod
    def forward(ctx: Any, logits: Any, iterations: int, launch: Any) -> Any:
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.launch = iterations, launch
        return launch(logits, None, iterations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up: Any) -> Any:
        (logits,) = ctx.saved_tensors
        return ctx.launch(logits, up, ctx.iterations), None, None
