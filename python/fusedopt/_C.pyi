from collections.abc import Sequence
from typing import Any

__version__: str
built_with_cuda: bool
cuda_decision: str
cuda_archs: str

def cuda_devices() -> tuple[int, int, str]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

class AdamWPlan:
    def __init__(self) -> None: ...
    def begin(self, grad_scale: float) -> None: ...
    def add_lists(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        exp_avgs: Sequence[Any],
        exp_avg_sqs: Sequence[Any],
        max_exp_avg_sqs: Sequence[Any] | None,
        step: Any,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
    ) -> None: ...
    def add_group(
        self,
        group: int,
        params: list[Any],
        state: dict[Any, dict[str, Any]],
        lr: float,
        weight_decay: float,
        beta1: float,
        beta2: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
    ) -> list[Any]: ...
    def check(self) -> None: ...
    def updated(self) -> list[Any]: ...
    def launch(self, threads: int) -> None: ...
    def clear(self) -> None: ...
