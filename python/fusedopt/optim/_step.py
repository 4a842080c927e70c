"""What a step does around the kernels, in every optimizer class."""

from collections.abc import Callable
from typing import Any

import torch


class FusedStep:
    """Comes before torch's class among the bases; the class says what the kernels are called by."""

    def _new_plan(self) -> Any:
        """What is kept between steps."""
        raise NotImplementedError

    def _update(self, plan: Any, grad_scale: Any, found_inf: Any) -> None:
        """One step over all groups."""
        raise NotImplementedError

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
            self._plan = self._new_plan()
        self._update(
            self._plan, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        return loss


def _check_graph_capture(optimizer: Any) -> None:
    """torch's own check that what is being captured was built for it, under its older name too."""
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()
