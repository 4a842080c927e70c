"""AdamW as a drop-in for ``torch.optim.AdamW``."""

from typing import Any

import torch
from torch import Tensor

from fusedopt import _C
from fusedopt.optim import _state
from fusedopt.optim._step import FusedStep
from fusedopt.steps.adamw import param_groups_step

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamW(FusedStep, torch.optim.AdamW):
    """``torch.optim.AdamW`` on fusedopt's kernels.

    Arguments, their order, defaults and meaning, ``state_dict`` and its keys are torch's, and
    checkpoints load both ways. All parameters of all groups are updated in one pass; nothing is
    written before everything has been checked.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as ``torch.optim.AdamW``.
        foreach: accepted and kept; there is one implementation here.
        capturable, fused: as in torch, either keeps the step counters of parameters on a GPU there
            too, and ``capturable=True`` is what capture in a CUDA graph asks for. Nothing waits for
            the device either way. ``fused=True`` makes ``torch.amp.GradScaler`` leave unscaling and
            the skipping of bad steps to the kernel.
        differentiable: refused: a fused kernel has no graph to differentiate.
        state_dtype: ``torch.float32`` or ``torch.bfloat16`` for both moments; ``None`` (default)
            keeps each parameter's own dtype, as torch does.

    Raises:
        ValueError, TypeError, RuntimeError: as torch for its arguments; at ``step``, a parameter,
            gradient or state that kernels can't take, by name.

    Source: Loshchilov & Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        _check_own_options({"state_dtype": state_dtype, "differentiable": differentiable})
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults["state_dtype"] = state_dtype
        for group in self.param_groups:
            group.setdefault("state_dtype", state_dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_own_options(param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("state_dtype", self.defaults.get("state_dtype"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class or of ``torch.optim.AdamW``.

        torch casts every state to its parameter's dtype; here ``state_dtype`` decides, and states
        that already have it keep their bits.
        """
        _state.load(self, super().load_state_dict, state_dict, _dtypes)

    def _new_plan(self) -> _C.AdamWPlan:
        return _C.AdamWPlan()

    def _update(self, plan: _C.AdamWPlan, grad_scale: Any, found_inf: Any) -> None:
        param_groups_step(
            self.param_groups,
            self.state,
            self._init_state,
            plan,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _init_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        init_state(self.state, group, params)


def _dtypes(param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    return dict.fromkeys(MOMENTS, _state.dtype_of(param, group["state_dtype"]))


def init_state(
    state: dict[Tensor, dict[str, Any]], group: dict[str, Any], params: list[Tensor]
) -> None:
    """Give a group's parameters the states, or the place of the counter, that they lack."""
    params = _state.without_state(state, params)
    keys = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    moments = [
        _state.zeros_like(params, group["state_dtype"], kind) for kind, _ in enumerate(keys, 1)
    ]
    on_device = group["capturable"] or group["fused"]
    counters = _state.step_counters(params, _counter_dtype(group), on_device)
    for p, step, *states in zip(params, counters, *moments, strict=True):
        state[p].update(step=step, **dict(zip(keys, states, strict=True)))


def _counter_dtype(group: dict[str, Any]) -> torch.dtype:
    """As torch's."""
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    return torch.float64 if double else torch.float32


def _check_own_options(options: dict[str, Any]) -> None:
    _state.check_dtype(options.get("state_dtype"))
    if options.get("differentiable"):
        raise ValueError(
            "differentiable is True, but a fused kernel has no graph to differentiate; "
            "use torch.optim.AdamW"
        )
