"""Short runs with a verdict: one for compute-sanitizer, and graph replay against eager steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench.gpu_lab.device import Device

_SIZES = (1, 31, 4097, 70_001)
_FORMATS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
_HYPER: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
_STEPS = 5

Lists = list[list[Tensor]]


def _lists(param: torch.dtype, state: torch.dtype) -> Lists:
    """Parameters, gradients and moments on the CPU: odd sizes, one of them unaligned."""
    rng = torch.Generator().manual_seed(1)

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(n + 3, generator=rng).to(dtype)[3:] for n in _SIZES]

    seconds = [x.square() for x in draw(state)]
    return [draw(param), draw(param), draw(state), seconds]


def _moved(lists: Lists, device: Device) -> Lists:
    """Copies on the device, each beginning after some elements of its memory."""
    moved = []
    for role in lists:
        memory = [torch.zeros(x.numel() + 3, dtype=x.dtype, device=device.name) for x in role]
        moved.append([m[3:].copy_(x) for m, x in zip(memory, role, strict=True)])
    return moved


def _require_same_bits(what: str, got: Lists, want: Lists) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            if not torch.equal(x.cpu(), y.cpu()):
                raise SystemExit(f"{what}: array {j} of role {i} differs")
    print(f"{what}: same bits")


def _numbers(device: Device) -> dict[str, Tensor]:
    """Numbers that stay on the device."""
    return {
        "step": torch.zeros((), device=device.name),
        "lr": torch.tensor(0.01, dtype=torch.float64, device=device.name),
        "grad_scale": torch.tensor(2.0, device=device.name),
        "found_inf": torch.zeros((), device=device.name),
    }


def sanitize(device: Device) -> None:
    """A step of every backend with numbers from the host, and one with numbers on the device."""
    for backend in device.backends:
        for param, state in _FORMATS:
            want = _lists(param, state)
            got = _moved(want, device)
            fusedopt.adamw_step(*got, step=1, lr=0.01, grad_scale=2.0, backend=backend, **_HYPER)
            fusedopt.adamw_step(*got, backend=backend, **_numbers(device), **_HYPER)
            device.synchronize()
            for _ in range(2):
                fusedopt.adamw_step(*want, step=1, lr=0.01, grad_scale=2.0, **_HYPER)
            _require_same_bits(f"{backend or 'cpu'} {param} {state}", got, want)


def graph(device: Device) -> None:
    """Replays of a captured step against eager steps, while gradients and lr change."""
    for backend in device.backends:
        for param, state in _FORMATS:
            _check_graph(device, backend, param, state)
    _check_optimizer_graph(device)


def _check_graph(
    device: Device, backend: str | None, param: torch.dtype, state: torch.dtype
) -> None:
    sets = [_moved(_lists(param, state), device) for _ in range(3)]
    numbers = [_numbers(device) for _ in sets]

    def step(i: int) -> None:
        fusedopt.adamw_step(*sets[i], backend=backend, **numbers[i], **_HYPER)

    with device.side_stream():
        step(2)  # compiles and loads what has to be
    device.synchronize()
    replay = device.capture(lambda: step(1))
    for number in range(_STEPS):
        for i in (0, 1):
            torch._foreach_mul_(sets[i][1], -0.5)
            numbers[i]["lr"].mul_(0.9)
            numbers[i]["found_inf"].fill_(float(number == 2))
        step(0)
        replay()
    device.synchronize()
    what = f"graph {backend or 'cpu'} {param} {state}"
    _require_same_bits(what, [*sets[1], [numbers[1]["step"]]], [*sets[0], [numbers[0]["step"]]])
    if int(numbers[0]["step"]) != _STEPS - 1:
        raise SystemExit(f"{what}: counted {int(numbers[0]['step'])} steps, not {_STEPS - 1}")


def _check_optimizer_graph(device: Device) -> None:
    """The same with ``optim.AdamW(capturable=True)``."""
    sets = [_moved(_lists(torch.float32, torch.float32)[:2], device) for _ in range(2)]
    optimizers = []
    for params, grads in sets:
        for p, g in zip(params, grads, strict=True):
            p.requires_grad_().grad = g
        capturable = device.name == "cuda"
        optimizers.append(fusedopt.optim.AdamW(params, lr=0.01, capturable=capturable, fused=True))
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
    _require_same_bits("graph optim.AdamW", [sets[1][0], *states[1]], [sets[0][0], *states[0]])
