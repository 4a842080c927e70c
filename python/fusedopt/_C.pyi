from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

__version__: str
built_with_cuda: bool
cuda_decision: str
cuda_archs: str

def cuda_devices() -> tuple[list[int], int, str]: ...
def device_of(array: Any, name: str) -> tuple[int, int]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def sinkhorn_knopp(logits: Any, up: Any, result: Any, iterations: int, threads: int) -> None: ...
def transport_workspace_bytes(n: int, m: int, low_memory: bool) -> int: ...
def transport_inspect(
    cost: Any, a: NDArray[Any], b: NDArray[Any], summaries: NDArray[Any], threads: int
) -> None: ...
def transport_adjoint(
    cost: Any,
    a: NDArray[Any],
    b: NDArray[Any],
    reg: NDArray[Any],
    g: NDArray[Any],
    rows: NDArray[Any],
    columns: NDArray[Any],
    x: NDArray[Any],
    y: NDArray[Any],
    residuals: NDArray[Any],
    workspace: NDArray[Any],
    lanes: int,
    threads: int,
) -> None: ...
def transport_solve(
    cost: Any,
    a: NDArray[Any],
    b: NDArray[Any],
    reg: NDArray[Any],
    range: NDArray[Any],
    f: NDArray[Any],
    g: NDArray[Any],
    trace: NDArray[Any],
    facts: NDArray[Any],
    tolerance: float,
    max_iterations: int,
    sinkhorn: bool,
    warm: bool,
    single_step: bool,
    low_memory: bool,
    watch: Callable[[int, tuple[float, ...]], bool] | None,
    workspace: NDArray[Any],
    lanes: int,
    threads: int,
) -> None: ...
def transport_gpu_workspace_bytes(problems: int, n: int, m: int) -> int: ...
def transport_solve_on_gpu(
    cost: Any,
    a: Any,
    b: Any,
    reg: Any,
    f: Any,
    g: Any,
    trace: Any,
    facts: Any,
    tolerance: float,
    max_iterations: int,
    trace_rows: int,
    sinkhorn: bool,
    warm: bool,
    single_step: bool,
    workspace: int,
    stream: int,
) -> None: ...
def tiny_plans(
    cost: Any, a: Any, b: Any, reg: float, iterations: int, plan: Any, stream: int
) -> None: ...
def tiny_plans_workspace_bytes(
    problems: int, n: int, m: int, single: bool, iterations: int
) -> int: ...
def tiny_plans_backward(
    cost: Any,
    a: Any,
    b: Any,
    reg: float,
    iterations: int,
    plan_gradient: Any,
    cost_gradient: Any,
    workspace: int,
    stream: int,
) -> None: ...

class AdamPlan:
    def begin(self, grad_scale: Any, found_inf: Any, stream: int | None, movable: bool) -> None: ...
    def check(self) -> None: ...
    def check_beside(self, other: AdamPlan) -> None: ...
    def updated(self) -> list[Any]: ...
    def gpus(self) -> list[int]: ...
    def first_on(self, gpu: int) -> Any: ...
    def rows_on_cpu(self) -> int: ...
    def current_stream(self, gpu: int) -> int | None: ...
    def workspace_bytes(self, gpu: int) -> int: ...
    def launch_gpu(self, gpu: int, stream: int, workspace: int) -> None: ...
    def launch(self, threads: int) -> None: ...
    def clear(self) -> None: ...

class AdamWPlan(AdamPlan):
    def __init__(self) -> None: ...
    def add_lists(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        exp_avgs: Sequence[Any],
        exp_avg_sqs: Sequence[Any],
        max_exp_avg_sqs: Sequence[Any] | None,
        step: Any,
        lr: list[Any],
        weight_decay: list[Any],
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
        lr: Any,
        weight_decay: Any,
        beta1: float,
        beta2: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
    ) -> list[Any]: ...
    def packed(self, gpu: int) -> tuple[NDArray[Any], ...]: ...
    def packed_on_cpu(self) -> tuple[NDArray[Any], ...]: ...

class NewtonSchulzSchedule:
    def __init__(
        self,
        steps: Sequence[tuple[float, float, float, bool]],
        gram_from: float,
        dtype: str,
        arithmetic: str,
    ) -> None: ...

class NewtonSchulzPlan:
    def __init__(self) -> None: ...
    def run(self, G: Any, result: Any, schedule: NewtonSchulzSchedule, threads: int) -> None: ...
    def prepare_gpu(
        self, G: Any, result: Any, schedule: NewtonSchulzSchedule
    ) -> tuple[int, int | None, int]: ...
    def launch_gpu(self, stream: int, workspace: int) -> None: ...
    def clear(self) -> None: ...

class BlockwiseAdamPlan(AdamPlan):
    def __init__(
        self, resolve: Callable[[Any, tuple[int, ...]], Sequence[tuple[int, ...]]]
    ) -> None: ...
    def add_lists(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        exp_avgs: Sequence[Any],
        block_sqs: Sequence[Any],
        partitions: list[Any],
        step: Any,
        lr: list[Any],
        weight_decay: list[Any],
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
        partitions: list[Any],
        lr: Any,
        weight_decay: Any,
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
    ) -> list[Any]: ...
    def packed(self, gpu: int) -> tuple[NDArray[Any], ...]: ...
    def packed_on_cpu(self) -> tuple[NDArray[Any], ...]: ...

class MuonPlan(AdamPlan):
    def __init__(
        self,
        resolve: Callable[[Any, tuple[int, ...]], Sequence[tuple[int, ...]]],
        normuon: bool,
    ) -> None: ...
    def packed(self, gpu: int) -> tuple[Any, ...]: ...
    def packed_on_cpu(self) -> tuple[Any, ...]: ...
    def add_lists(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        momentum_buffers: Sequence[Any],
        row_sqs: Sequence[Any] | None,
        partitions: list[Any],
        lr: list[Any],
        weight_decay: list[Any],
        momentum: Any,
        options: dict[str, Any],
    ) -> None: ...
    def add_group(
        self,
        group: int,
        params: list[Any],
        state: dict[Any, dict[str, Any]],
        partitions: list[Any],
        lr: Any,
        weight_decay: Any,
        momentum: Any,
        options: dict[str, Any],
    ) -> list[Any]: ...
