"""Short runs with a verdict: one for compute-sanitizer, and graph replay against eager steps.

An algorithm takes part by a row in ``ALGORITHMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench.gpu_lab.device import Device
from bench.gpu_lab.registry import CHECKS
from fusedopt.partitions import Contiguous, block_count

_FORMATS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
_HYPER: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
_STEPS = 5

Lists = list[list[Tensor]]


@dataclass(frozen=True)
class Algorithm:
    """What the lab asks of an algorithm: lists to work on, and a step over them in place.

    ``lists(param, state)`` makes them on the CPU, the gradients second. ``step`` takes copies of
    them, ``backend`` and those of the numbers step, lr, grad_scale and found_inf that ``numbers``
    names; on a GPU they may lie there. ``rounding``: how far, in units of a float32's last place,
    backends' results may be apart. ``optimizer(params, capturable)``: its class, if it has one.
    """

    lists: Callable[[torch.dtype, torch.dtype], Lists]
    step: Callable[..., object]
    numbers: Sequence[str] = ("step", "lr", "grad_scale", "found_inf")
    rounding: float = 0.0
    optimizer: Callable[[list[Tensor], bool], Any] | None = None


def _drawn(sizes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, each array beginning three elements after an aligned address."""
    rng = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(torch.Size(s).numel() + 3, generator=rng).to(dtype) for s in sizes)
    return [x[3:].view(s) for x, s in zip(drawn, sizes, strict=True)]


# ---- AdamW

_SIZES = [(1,), (31,), (4097,), (70_001,)]


def _adamw_lists(param: torch.dtype, state: torch.dtype) -> Lists:
    firsts, seconds = _drawn(_SIZES, 3, state), _drawn(_SIZES, 4, state)
    return [
        _drawn(_SIZES, 1, param), _drawn(_SIZES, 2, param), firsts, [x.square() for x in seconds]
    ]  # fmt: skip


def _adamw_step(lists: Lists, **options: Any) -> None:
    fusedopt.adamw_step(*lists, **options, **_HYPER)


def _adamw(params: list[Tensor], capturable: bool) -> Any:
    return fusedopt.optim.AdamW(params, lr=0.01, capturable=capturable, fused=True)


# ---- blockwise Adam: blocks of one pass, of two, columns, one of all, and single coordinates

_BLOCKS: list[tuple[tuple[int, ...], Any]] = [
    ((9, 768), "row"),
    ((70, 33), "column"),
    ((3, 30_001), "tensor"),
    ((20_001,), Contiguous(7)),
    ((4097,), "coordinate"),
    ((31,), "global"),
    ((5, 67), "global"),
]
_SHAPES, _KINDS = [shape for shape, _ in _BLOCKS], [kind for _, kind in _BLOCKS]


def _blockwise_lists(param: torch.dtype, state: torch.dtype) -> Lists:
    blocks = [torch.full((block_count(kind, shape),), 0.3) for shape, kind in _BLOCKS]
    return [_drawn(_SHAPES, 1, param), _drawn(_SHAPES, 2, param), _drawn(_SHAPES, 3, state), blocks]


def _blockwise_step(lists: Lists, **options: Any) -> None:
    fusedopt.blockwise_adam_step(*lists, partitions=_KINDS, **options, **_HYPER)


def _blockwise_adam(params: list[Tensor], capturable: bool) -> Any:
    named = [(str(i), p) for i, p in enumerate(params)]
    kinds = {name: "row" for name, _ in named}
    return fusedopt.optim.BlockwiseAdam(named, lr=0.01, capturable=capturable, partition=kinds)


# ---- Muon, in float32 throughout: both forms of its products, every kind of matrix

_MATRICES = [(9, 33), (40, 20), (64, 64), (3, 130)]


def _muon_lists(param: torch.dtype, state: torch.dtype) -> Lists:
    return [_drawn(_MATRICES, seed, dtype) for seed, dtype in ((1, param), (2, param), (3, state))]


def _muon_step(lists: Lists, **options: Any) -> None:
    fusedopt.muon_step(*lists, weight_decay=0.1, ns_dtype="float32", **options)


def _muon(params: list[Tensor], capturable: bool) -> Any:
    return fusedopt.optim.Muon(params, lr=0.01, capturable=capturable)


ALGORITHMS = {
    "adamw": Algorithm(_adamw_lists, _adamw_step, optimizer=_adamw),
    # sums have other orders on other backends
    "blockwise_adam": Algorithm(
        _blockwise_lists, _blockwise_step, rounding=8.0, optimizer=_blockwise_adam
    ),
    # so have products, of which five steps follow one another
    "muon": Algorithm(
        _muon_lists, _muon_step, ("lr", "grad_scale", "found_inf"), rounding=500.0, optimizer=_muon
    ),
}


# ---- what is done with them


def _moved(lists: Lists, device: Device) -> Lists:
    """Copies on the device, each beginning after some elements of its memory."""
    moved = []
    for role in lists:
        memory = [torch.zeros(x.numel() + 3, dtype=x.dtype, device=device.name) for x in role]
        moved.append([m[3:].view(x.shape).copy_(x) for m, x in zip(memory, role, strict=True)])
    return moved


def _require_same(what: str, got: Lists, want: Lists, rounding: float = 0.0) -> None:
    """The same bits, or numbers a few last places of float32 and one of their own dtype apart."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            own = torch.finfo(y.dtype).eps if rounding else 0.0
            allowed = rounding * torch.finfo(torch.float32).eps + own
            if not torch.allclose(x.cpu().double(), y.cpu().double(), rtol=allowed, atol=allowed):
                raise SystemExit(f"{what}: array {j} of role {i} differs")
    print(f"{what}: same {'numbers' if rounding else 'bits'}")


def _numbers(algorithm: Algorithm, device: Device) -> dict[str, Tensor]:
    """Numbers that stay on the device."""
    numbers = {
        "step": torch.zeros((), device=device.name),
        "lr": torch.tensor(0.01, dtype=torch.float64, device=device.name),
        "grad_scale": torch.tensor(2.0, device=device.name),
        "found_inf": torch.zeros((), device=device.name),
    }
    return {name: numbers[name] for name in algorithm.numbers}


def sanitize(device: Device) -> None:
    """A step of every backend with numbers from the host, and one with numbers on the device."""
    for name in CHECKS:
        algorithm = ALGORITHMS[name]
        told = {"step": 1, "lr": 0.01, "grad_scale": 2.0}
        told = {key: value for key, value in told.items() if key in algorithm.numbers}
        for backend in device.backends:
            for param, state in _FORMATS:
                want = algorithm.lists(param, state)
                got = _moved(want, device)
                algorithm.step(got, backend=backend, **told)
                algorithm.step(got, backend=backend, **_numbers(algorithm, device))
                device.synchronize()
                for _ in range(2):
                    algorithm.step(want, **told)
                what = f"{name} {backend or 'cpu'} {param} {state}"
                _require_same(what, got, want, algorithm.rounding)


def graph(device: Device) -> None:
    """Replays of a captured step against eager steps, while gradients and lr change."""
    for name in CHECKS:
        for backend in device.backends:
            for param, state in _FORMATS:
                _check_graph(device, name, backend, param, state)
        if ALGORITHMS[name].optimizer:
            _check_optimizer_graph(device, name)


def _check_graph(
    device: Device, name: str, backend: str | None, param: torch.dtype, state: torch.dtype
) -> None:
    algorithm = ALGORITHMS[name]
    sets = [_moved(algorithm.lists(param, state), device) for _ in range(3)]
    numbers = [_numbers(algorithm, device) for _ in sets]

    def step(i: int) -> None:
        algorithm.step(sets[i], backend=backend, **numbers[i])

    with device.side_stream():
        step(2)  # compiles and loads what has to be
    device.synchronize()
    replay = device.capture(lambda: step(1))
    what = f"graph {name} {backend or 'cpu'} {param} {state}"
    for number in range(_STEPS):
        for i in (0, 1):
            torch._foreach_mul_(sets[i][1], -0.5)
            if "lr" in numbers[i]:
                numbers[i]["lr"].mul_(0.9)
            if "found_inf" in numbers[i]:
                numbers[i]["found_inf"].fill_(float(number == 2))
        before = _moved(sets[0], device)
        step(0)
        replay()
        if number == 2:
            _require_same(f"{what}, found_inf", sets[0], before)
    device.synchronize()
    _require_same(what, sets[1], sets[0])
    for of in numbers[:2] if "step" in algorithm.numbers else []:
        if int(of["step"]) != _STEPS - 1:
            raise SystemExit(f"{what}: counted {int(of['step'])} steps, not {_STEPS - 1}")


def _check_optimizer_graph(device: Device, name: str) -> None:
    """The same with the optimizer's class, capturable."""
    algorithm = ALGORITHMS[name]
    sets = [_moved(algorithm.lists(torch.float32, torch.float32)[:2], device) for _ in range(2)]
    optimizers = []
    for params, grads in sets:
        for p, g in zip(params, grads, strict=True):
            p.requires_grad_().grad = g
        assert algorithm.optimizer
        optimizers.append(algorithm.optimizer(params, device.name == "cuda"))
    with device.side_stream():
        for optimizer in optimizers:
            optimizer.step()
    device.synchronize()
    replay = device.capture(lambda: optimizers[1].step())
    for _ in range(_STEPS):
        for _, grads in sets:
            torch._foreach_mul_(grads, -0.5)
        optimizers[0].step()
        replay()
    device.synchronize()
    states = [
        [list(o.state[p].values()) for p in s[0]] for o, s in zip(optimizers, sets, strict=True)
    ]
    what = f"graph optim, {name}"
    _require_same(what, [sets[1][0], *states[1]], [sets[0][0], *states[0]])
