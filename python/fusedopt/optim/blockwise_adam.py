"""Blockwise Adam: AdamW with one second moment per block of coordinates."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedopt import _C, partitions
from fusedopt.optim import _partitions, _state
from fusedopt.optim._step import FusedStep
from fusedopt.steps import _adam
from fusedopt.steps import blockwise_adam as steps


class BlockwiseAdam(FusedStep, torch.optim.Optimizer):
    """AdamW that keeps one second moment for each block of coordinates instead of one for each.

    Adam-mini, AdaSGD and layer-wise Adam are partitions of it; ``"coordinate"`` is AdamW.

    Args:
        params: parameters, groups or named parameters, as every torch optimizer takes them.
        lr, betas, eps, weight_decay: as ``torch.optim.AdamW``.
        partition: the blocks of every parameter (see ``fusedopt.partitions``), or a mapping from
            parameters, or their names where ``params`` are named, to partitions, or a function from
            a parameter to one. Also per group. Each group's ``"partition"`` then lists one per
            parameter. ``"global"`` is one block over all tensors of a group.
        maximize: ascend instead of descend.
        capturable: keep the step counters of parameters on a GPU there too, as capture in a CUDA
            graph asks for. Nothing waits for the device either way.
        state_dtype: ``torch.float32`` or ``torch.bfloat16`` for the first moment; ``None`` keeps
            each parameter's own dtype.

    State: ``step``, ``exp_avg`` and ``block_sq``, one float32 per block. A checkpoint holds the
    partitions as plain data; loading it into other ones is refused. ``torch.amp.GradScaler`` leaves
    unscaling and the skipping of bad steps to the kernel.

    Raises:
        ValueError, TypeError: an option, or a partition that does not fit its parameter; at
            ``step``, what kernels can't take, by name.

    Source: Xie, Mohamadi & Li, arXiv:2410.08198; Adam-mini: Zhang et al., arXiv:2406.16793.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        partition: Any = "row",
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "partition": partition,
            "maximize": maximize,
            "capturable": capturable,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        _state.check_dtype(options["state_dtype"])
        _adam.options(0, *(options[k] for k in ("lr", "betas", "eps", "weight_decay", "maximize")))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["partition"] = _partitions.one_each(group, partitions.resolve)
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().state_dict()
        _partitions.to_data(saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of this class.

        Raises:
            ValueError: it was saved with other partitions; both are named. Nothing is loaded.
        """
        check = partial(_partitions.put_in_own, self.param_groups)
        _state.load(self, super().load_state_dict, state_dict, _dtypes, check)

    def _new_plan(self) -> _C.BlockwiseAdamPlan:
        return steps.new_plan()

    def _update(self, plan: _C.BlockwiseAdamPlan, grad_scale: Any, found_inf: Any) -> None:
        steps.param_groups_step(
            self.param_groups,
            self.state,
            self._init_state,
            plan,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _init_state(self, group: dict[str, Any], params: list[Tensor]) -> None:
        params = _state.without_state(self.state, params)
        wanted = {id(p) for p in params}
        kinds = [
            kind
            for p, kind in zip(group["params"], group["partition"], strict=True)
            if id(p) in wanted
        ]
        counts = [
            partitions.block_count(kind, p.shape) for p, kind in zip(params, kinds, strict=True)
        ]
        counters = _state.step_counters(params, torch.float32, group["capturable"])
        moments = _state.zeros_like(params, group["state_dtype"], 1)
        seconds = _state.vectors(counts, params, torch.float32, 2)
        held = self._global_value(group)
        for p, kind, step, m, v in zip(params, kinds, counters, moments, seconds, strict=True):
            if kind == "global" and held is not None:
                v.copy_(held)
            self.state[p].update(step=step, exp_avg=m, block_sq=v)

    def _global_value(self, group: dict[str, Any]) -> Tensor | None:
        """What the group's tensors of partition "global" hold; None if none has a state yet."""
        members = zip(group["params"], group["partition"], strict=True)
        states = (self.state.get(p, {}) for p, kind in members if kind == "global")
        return next((state["block_sq"] for state in states if state), None)


def _dtypes(param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
    return {
        "exp_avg": _state.dtype_of(param, group["state_dtype"]),
        "block_sq": torch.float32,
    }
