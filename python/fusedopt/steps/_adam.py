"""What the functional steps of Adam's family share: checks of options, and the walk over groups."""

import importlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from fusedopt import _C, _arrays, _gpu, _options, backends
from fusedopt._threads import get_num_threads

P = TypeVar("P")

_local = threading.local()


class Plan(Protocol):
    """What a step over groups asks of a plan, or of several together."""

    def check(self) -> None: ...
    def updated(self) -> list[Any]: ...
    def clear(self) -> None: ...


Launcher = Callable[..., None]


def thread_plan(make: Callable[[], P]) -> P:
    """This thread's plan: it remembers which table passed the overlap check."""
    plans: dict[Any, Any] = _local.__dict__.setdefault("plans", {})
    if make not in plans:
        plans[make] = make()
    plan: P = plans[make]
    return plan


def check_stream(stream: Any, backend: str) -> None:
    """Refuse what is no stream, and streams where there are none."""
    if stream is None:
        return
    if isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream is {stream!r}, expected the address of a CUDA stream as an int")
    if stream < 0 or backend not in backends.GPU:
        wanted = ">= 0" if backend in backends.GPU else f"None: backend {backend!r} has no streams"
        raise ValueError(f"stream is {stream!r}, expected {wanted}")


def options(
    count: int,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Any,
    maximize: bool,
    on_device: bool = False,
) -> dict[str, Any]:
    """The checked options of ``count`` tensors, as plans take them."""
    return {
        "lr": _options.number_per_tensor("lr", lr, count, on_device),
        "weight_decay": _options.number_per_tensor("weight_decay", weight_decay, count, on_device),
        "beta1": beta("betas[0]", betas[0]),
        "beta2": beta("betas[1]", betas[1]),
        "eps": _options.number("eps", eps, 0.0),
        "maximize": bool(maximize),
    }


def beta(name: str, value: Any) -> float:
    """A number in [0, 1) that is not on a GPU."""
    if _options.on_gpu(name, value):
        raise ValueError(f"{name} is on a GPU, expected a number or an array on the CPU")
    return _options.number(name, value, 0.0, 1.0)


def step_of(step: Any, count: int) -> Any:
    """An int, one 0-d array, or a list of counters."""
    if isinstance(step, bool):
        raise TypeError(f"step is {step!r}, expected a whole number >= 1 or arrays")
    if isinstance(step, int) and step < 1:
        raise ValueError(f"step is {step}, but steps count from 1")
    if isinstance(step, Sequence) or getattr(step, "ndim", 0) == 1:
        if len(step) != count:
            raise ValueError(f"step has {len(step)} counters, expected {count}: one a tensor")
        return list(step) if isinstance(step, Sequence) else [step[i : i + 1] for i in range(count)]
    return step


def loss_scale(grad_scale: Any, found_inf: Any, on_device: bool) -> tuple[Any, Any, bool]:
    """``grad_scale`` as a number or GPU array, ``found_inf`` if it is one, whether to skip."""
    if grad_scale is None:
        scale: Any = 1.0
    elif on_device and _options.on_gpu("grad_scale", grad_scale):
        scale = grad_scale
    else:
        scale = _options.number("grad_scale", grad_scale, 0.0)
        if scale == 0.0:
            raise ValueError("grad_scale is 0, expected a number > 0")
    if on_device and found_inf is not None and _options.on_gpu("found_inf", found_inf):
        return scale, found_inf, False
    return scale, None, is_set(found_inf)


def is_set(found_inf: Any) -> bool:
    """Whether nothing is to be written."""
    return found_inf is not None and float(found_inf) != 0.0


def param_groups_step(
    plan: Plan,
    param_groups: Iterable[dict[str, Any]],
    begin: Callable[[], None],
    add_group: Callable[[int, dict[str, Any]], list[Any]],
    init_state: Callable[[dict[str, Any], list[Any]], None],
    launch: Callable[[], None] | None,
) -> None:
    """One step over a torch optimizer's own structures.

    Args:
        plan: kept by the optimizer between steps.
        param_groups: the optimizer's.
        begin: begins the plan.
        add_group: adds a group to it; returns its parameters that have a gradient but no state yet,
            or whose step counter has to move to their GPU.
        init_state: called with a group and such parameters.
        launch: does the work; ``None`` if the step is to be skipped.
    """

    def add_groups() -> list[tuple[dict[str, Any], list[Any]]]:
        begin()
        added = [(group, add_group(index, group)) for index, group in enumerate(param_groups)]
        return [(group, params) for group, params in added if params]

    try:
        if missing := add_groups():
            for group, params in missing:
                init_state(group, params)
            if add_groups():
                raise RuntimeError("init_state left parameters without the state that they need")
        plan.check()
        if launch is not None:
            _arrays.bump_tensor_versions(plan.updated())
            launch()
    finally:
        plan.clear()


def number_or_on_device(name: str, value: Any) -> Any:
    """A group's option as a plan takes it: a float, or the array on a GPU."""
    return value if _options.on_gpu(name, value) else float(value)


def check_device(plan: _C.AdamPlan, backend: str) -> None:
    """Refuse arrays that do not lie where the backend works."""
    if backend == "cpu" and plan.gpus():
        raise ValueError("params[0] is on a GPU, but backend 'cpu' takes arrays on the CPU")
    on_gpu = backend == "cuda" or (backend == "triton" and not backends.triton_is_interpreted())
    if on_gpu and plan.rows_on_cpu():
        raise ValueError(f"params[0] is on the CPU, but backend {backend!r} takes arrays on a GPU")


def launch(
    plan: Any,
    operation: str,
    *,
    stream: int | None = None,
    found_inf: Any = None,
    backend: str | None = None,
) -> None:
    """Everything that the plan holds: GPUs first, since a launch there may fail.

    Args:
        operation: its name in the table of defaults.
        backend: on GPUs; ``None`` asks that table.
    """
    for gpu in plan.gpus():
        like = plan.first_on(gpu)
        chosen = stream_on(gpu, plan, stream)
        if (backend or backends.gpu_default(operation, gpu)) == "triton":
            triton_room(operation).launch(*plan.packed(gpu), gpu=gpu, stream=chosen)
            continue
        size = plan.workspace_bytes(gpu)
        memory = _gpu.workspace(size, gpu, like, stream) if size else None
        plan.launch_gpu(gpu, chosen, 0 if memory is None else memory.data_ptr())
    if not (plan.rows_on_cpu() and is_set(found_inf)):
        plan.launch(get_num_threads())


def triton_room(operation: str) -> Any:
    """Where the operation's Triton kernels stand: under the algorithm's name."""
    return importlib.import_module(f"fusedopt.triton_kernels.{operation.removesuffix('_step')}")


def launchers(operation: str, reference: Callable[..., Any]) -> dict[str, Launcher]:
    """How each backend takes a functional step: ``(plan, lists, stream, step, scale, options)``.

    The last three, and whatever else is given by name, are for the reference; plans hold them.
    """

    def kernels(plan: Any, lists: Any, stream: int | None, *_: Any, **__: Any) -> None:
        bump_written(lists)
        launch(plan, operation, stream=stream, backend="cuda")

    def triton(plan: Any, lists: Any, stream: int | None, *_: Any, **__: Any) -> None:
        bump_written(lists)
        if plan.gpus():
            launch(plan, operation, stream=stream, backend="triton")
        else:  # in the interpreter
            triton_room(operation).launch(*plan.packed_on_cpu())

    def float64(plan: Any, lists: Any, stream: int | None, *given: Any, **more: Any) -> None:
        launch_reference(reference, lists, *given, **more)

    return {"cpu": kernels, "cuda": kernels, "triton": triton, "reference": float64}


def stream_on(gpu: int, plan: _C.AdamPlan, stream: int | None) -> int:
    """The stream asked for, or the one that the arrays' library works on now."""
    if stream is None:
        stream = plan.current_stream(gpu)
    return _gpu.current_stream(gpu, plan.first_on(gpu)) if stream is None else stream


def bump_written(lists: dict[str, Sequence[Any]]) -> None:
    """Autograd learns that all lists but the gradients are about to be written."""
    _arrays.bump_versions(
        array for name, arrays in lists.items() if name != "grads" for array in arrays
    )


def launch_reference(
    reference: Callable[..., Any],
    lists: dict[str, Sequence[Any]],
    step: Any,
    scale: float,
    options: dict[str, Any],
    **more: Any,
) -> None:
    """Run a float64 reference and write what it returns; ``more`` goes to it as it is."""
    counters = [] if isinstance(step, int) else step if isinstance(step, list) else [step]
    taken = [int(_arrays.to_float64(counter).item()) + 1 for counter in counters]
    values: dict[str, Any] = {
        name: [None if a is None else _arrays.to_float64(a) for a in arrays]
        for name, arrays in lists.items()
    }
    result = reference(
        **values,
        step=step if isinstance(step, int) else taken if isinstance(step, list) else taken[0],
        lr=_one_or_all(options["lr"]),
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=_one_or_all(options["weight_decay"]),
        maximize=options["maximize"],
        grad_scale=scale,
        **more,
    )
    for name, arrays in lists.items():
        if name != "grads":
            for array, value in zip(arrays, getattr(result, name), strict=True):
                _arrays.assign(array, value.reshape(tuple(array.shape)))
    for i, (counter, number) in enumerate(zip(counters, taken, strict=True)):
        if len(counters) == 1 or lists["grads"][i] is not None:
            _arrays.assign(counter, number)


def _one_or_all(numbers: list[float]) -> float | list[float]:
    return numbers[0] if len(numbers) == 1 else numbers
