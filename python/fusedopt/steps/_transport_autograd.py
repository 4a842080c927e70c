"""Gradients of the transport value, by the envelope theorem: nothing is unrolled."""

from typing import Any

import torch


class Value(torch.autograd.Function):
    """The value of solved problems; its gradients are the plan and the potentials."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Any,
        a: Any,
        b: Any,
        f: Any,
        g: Any,
        reg: Any,
        values: Any,
        batched: bool,
    ) -> Any:
        ctx.save_for_backward(cost, a, b, f, g, reg)
        ctx.batched = batched
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up: Any) -> Any:
        cost, a, b, f, g, reg = ctx.saved_tensors
        grads: list[Any] = [None, None, None]
        if ctx.needs_input_grad[0]:
            plan = (f[:, :, None] - cost.to(torch.float64) + g[:, None, :]) / reg[:, None, None]
            grads[0] = (plan.exp_() * up[:, None, None]).reshape(cost.shape).to(cost.dtype)
        for i, (given, potential) in enumerate(((a, f), (b, g)), start=1):
            if ctx.needs_input_grad[i]:
                each = (potential + reg[:, None] / 2) * up[:, None]
                if given.ndim == 1:  # one marginal for all problems
                    each = each.sum(0)
                grads[i] = each.to(given.dtype)
        return *grads, None, None, None, None, None
