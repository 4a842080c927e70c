"""Gradients of optimal transport; nothing is unrolled.

The value's are the plan and the potentials (envelope theorem). The potentials' come from the
equations that they solve, ``P1 = a`` and ``Pᵀ1 = b``: for gradients (p, q) with respect to (f, g),

    a x + P y = p,   Pᵀ x + b y = q   gives   reg x for a,   reg y for b,   P ∘ (x_i + y_j) for C,

after what (p, q) would change of the gauge ``⟨f, a⟩ = ⟨g, b⟩`` is taken off. The plan's follow from
the potentials' by autograd.
"""

import warnings
from typing import Any

import torch

_SOLVED = 1e-6  # a residual beyond it is worth a warning


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
                grads[i] = each.to(given)  # a marginal may lie elsewhere than the cost
        return *grads, None, None, None, None, None


class Potentials(torch.autograd.Function):
    """f and g of solved problems, by implicit differentiation."""

    @staticmethod
    def forward(ctx: Any, cost: Any, a: Any, b: Any, f: Any, g: Any, given: Any, solve: Any) -> Any:
        ctx.save_for_backward(cost, a, b, f, g)
        ctx.given, ctx.solve = given, solve
        return f.clone(), g.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up_f: Any, up_g: Any) -> Any:
        cost, a, b, f, g = ctx.saved_tensors
        if ctx.solve is None:
            raise NotImplementedError("gradients of plans and potentials: on the CPU only")
        masses = [torch.from_numpy(x) for x in (ctx.given.a, ctx.given.b)]
        reg = torch.from_numpy(ctx.given.reg)[:, None]
        rows, columns = (
            up.masked_fill(mass == 0, 0) for up, mass in zip((up_f, up_g), masses, strict=True)
        )
        tilt = (rows.sum(1) - columns.sum(1))[:, None] / (2 * masses[0].sum(1)[:, None])
        arrays = (f, g, rows - tilt * masses[0], columns + tilt * masses[1])
        x, y, residuals = ctx.solve(ctx.given, *(each.contiguous().numpy() for each in arrays))
        if residuals.max() > _SOLVED:
            warnings.warn(
                f"the gradient's linear system was solved to {residuals.max():.0e} only: the plan "
                "nearly falls into pieces",
                RuntimeWarning,
                stacklevel=2,
            )
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        grads: list[Any] = [None, None, None]
        if ctx.needs_input_grad[0]:
            plan = (f[:, :, None] - cost.to(torch.float64) + g[:, None, :]) / reg[:, :, None]
            grads[0] = (plan.exp_() * (x[:, :, None] + y[:, None, :])).reshape(cost.shape)
            grads[0] = grads[0].to(cost.dtype)
        sides = ((a, reg * x, -tilt * f, masses[0]), (b, reg * y, tilt * g, masses[1]))
        for i, (wanted, each, gauge, mass) in enumerate(sides, start=1):
            if ctx.needs_input_grad[i]:
                each = each + gauge.masked_fill(mass == 0, 0)
                grads[i] = (each.sum(0) if wanted.ndim == 1 else each).to(wanted.dtype)
        return *grads, None, None, None, None
