"""AdamW as a drop-in for ``torch.optim.AdamW``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedopt import _C
from fusedopt.optim import _state
from fusedopt.steps.adamw import param_groups_step

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamW(torch.optim.AdamW):
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
        final: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        _state.restore_dtypes(
            self,
            final[0],
            lambda p, group: dict.fromkeys(MOMENTS, _state.dtype_of(p, group["state_dtype"])),
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, on whatever devices they are.

        Args:
            closure: called first with gradients enabled; its loss is returned.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "_plan" not in self.__dict__:  # not part of the state: rebuilt after a copy or a load
            self._plan = _C.AdamWPlan()
        param_groups_step(
            self.param_groups,
            self.state,
            self._init_state,
            self._plan,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        return loss

    def _init_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if self.state[p]:  # all it lacks is a counter that follows found_inf on the GPU
                step = self.state[p]["step"]
                self.state[p]["step"] = step.to(p.device, torch.float32, non_blocking=True)
        params = [p for p in params if not self.state[p]]
        keys = MOMENTS if group["amsgrad"] else MOMENTS[:2]
        moments = [
            _state.zeros_like(params, group["state_dtype"], kind) for kind, _ in enumerate(keys, 1)
        ]
        for p, step, *states in zip(params, _counters(group, params), *moments, strict=True):
            self.state[p].update(step=step, **dict(zip(keys, states, strict=True)))


def _counters(group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """Step counters where torch has them: on the CPU, unless ``capturable`` or ``fused``."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    if group["fused"]:
        dtype = torch.float32
    if not (group["capturable"] or group["fused"]):
        return _state.step_counters(len(params), dtype, torch.device("cpu"))
    devices = [p.device for p in params]
    counters = {
        device: iter(_state.step_counters(devices.count(device), dtype, device))
        for device in set(devices)
    }
    return [next(counters[device]) for device in devices]


def _check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's own check that what is being captured was built for it, under its older name too."""
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()


def _check_own_options(options: dict[str, Any]) -> None:
    _state.check_dtype(options.get("state_dtype"))
    if options.get("differentiable"):
        raise ValueError(
            "differentiable is True, but a fused kernel has no graph to differentiate; "
            "use torch.optim.AdamW"
        )
