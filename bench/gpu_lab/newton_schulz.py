"""Newton–Schulz on a GPU: Jordan's five steps on half-precision matrices, against torch and peers.

Every answer is checked against float64 on the device. The floor is torch's three products of each
step and nothing else, at the library's own speed and without symmetry.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fusedopt
from bench import peers
from bench.adamw import built
from bench.gpu_lab.device import Device
from bench.gpu_lab.measure import ROUNDS, Benchmark, Goal, GpuCase
from bench.harness.timing import Contestant
from fusedopt._newton_schulz_schedule import COEFFICIENTS

_STEPS = 5
_CASES = {
    "4096": (1, 4096, 4096),
    "12x1024x4096": (12, 1024, 4096),
    "4096x11008": (1, 4096, 11008),
    "24x2048x7168": (24, 2048, 7168),
    "64x128x7168": (64, 128, 7168),
    "12x768": (12, 768, 768),
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_BOUNDS = {"fp16": 0.02, "bf16": 0.06}  # relative errors of random matrices
_PRODUCTS = "products alone"


class _Problem:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.g = torch.randn(shape, generator=generator).to(device.name, dtype)
        n, m = sorted(shape[1:])
        self.teraflops = 1e-12 * shape[0] * _STEPS * (4 * m * n**2 + 2 * n**3)

    def exact(self, coefficients: str) -> Tensor:
        """Of the last matrix, in float64."""
        triples = COEFFICIENTS[coefficients]
        x = self.g[-1].double()
        x = x.mT if x.size(0) > x.size(1) else x
        x = x / x.norm()
        for t in range(_STEPS):
            a, b, c = triples[min(t, len(triples) - 1)]
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if self.g.size(-2) > self.g.size(-1) else x

    def contestant(
        self, name: str, call: Callable[[Tensor], Tensor], precision: str, coefficients: str
    ) -> Contestant:
        """One that runs on the whole batch, with its error in the note."""
        want = self.exact(coefficients)
        error = float((call(self.g).reshape(self.g.shape)[-1].double() - want).norm() / want.norm())
        wrong = "" if error <= _BOUNDS[precision] else f"relative error {error:.1e}"
        return Contestant(name, lambda: call(self.g), f"relative error {error:.1e}", wrong)

    def products(self) -> Contestant:
        """torch.bmm alone, into memory that waits."""
        x = self.g if self.g.size(-2) <= self.g.size(-1) else self.g.mT.contiguous()
        a, b, y = x @ x.mT, x @ x.mT, torch.empty_like(x)

        def run() -> None:
            for _ in range(_STEPS):
                torch.bmm(x, x.mT, out=a)
                torch.bmm(a, a, out=b)
                torch.bmm(b, x, out=y)

        return Contestant(_PRODUCTS, run)


def _ours(problem: _Problem, name: str, precision: str, **options: Any) -> Contestant:
    def call(g: Tensor) -> Tensor:
        result: Tensor = fusedopt.newton_schulz(g, **options)
        return result

    return problem.contestant(name, call, precision, "jordan")


def _peer(problem: _Problem, peer: peers.MatrixFunctionPeer) -> Contestant:
    return problem.contestant(peer.name, peer.call, peer.precision, peer.coefficients)


@torch.no_grad()
def _build(device: Device, name: str, key: str) -> GpuCase:
    count, rows, columns = _CASES[name]
    shape = (count, rows, columns) if device.scale == 1 else (2, rows // 64, columns // 64)
    problem = _Problem(shape, _DTYPES[key], device)
    found, missing = peers.find("newton_schulz_gpu", None)
    builders: dict[str, Callable[[], Contestant]] = {
        _PRODUCTS: problem.products,
        "fusedopt": partial(_ours, problem, "fusedopt", key),
    }
    for backend, method in itertools.product(device.backends, ("standard", "gram")):
        title = ", ".join(word for word in ("fusedopt.newton_schulz", backend, method) if word)
        builders[title] = partial(_ours, problem, title, key, backend=backend, method=method)
    builders |= {peer.name: partial(_peer, problem, peer) for peer in found}
    contestants, not_run = built(builders)
    return GpuCase(
        name=name,
        variant=key,
        threads=1,
        contestants=contestants,
        not_run=missing | not_run,
        rounds=ROUNDS,
        detail="x".join(map(str, shape)),
        work=problem.teraflops,
        unit="TFLOP/s",
        floor=_PRODUCTS,
    )


BENCHMARK = Benchmark(
    cases=list(itertools.product(_CASES, _DTYPES)),
    build=_build,
    goals=[
        Goal("4096", "bf16", "torch.compile bf16", "median_ms", 1.45),
        Goal("12x1024x4096", "fp16", "torch.compile bf16", "median_ms", 2.3),
        Goal("12x1024x4096", "fp16", "gram-newton-schulz", "median_ms", 1.0),
        Goal("24x2048x7168", "fp16", "gram-newton-schulz", "median_ms", 1.0),
    ],
)
