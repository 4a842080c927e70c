"""Sinkhorn-Knopp on many small matrices, as hyper-connections have them: 20 iterations each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fusedopt
from bench import peers
from bench.harness.answers import Expected, pick
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant
from fusedopt.references import sinkhorn_knopp as reference

ITERATIONS = 20
CASES = {
    "tokens": ("65536 matrices of 4 x 4", (65536, 4, 4)),
    "few": ("512 matrices of 4 x 4", (512, 4, 4)),
    "wide": ("8192 matrices of 8 x 8", (8192, 8, 8)),
}
VARIANTS = {"fp32": torch.float32, "fp64": torch.float64}
QUICK = {"cases": ("tokens",), "dtypes": ("fp32",), "rounds": 5}
__all__ = ["CASES", "QUICK", "VARIANTS", "cases"]


def plain(logits: Tensor) -> Tensor:
    """The iterations as torch runs them, one operation after the other."""
    x = (logits - logits.amax(-1, keepdim=True)).exp()
    for _ in range(ITERATIONS):
        x = x / x.sum(-1, keepdim=True)
        x = x / x.sum(-2, keepdim=True)
    return x


def _with_gradient(call: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], object]:
    given = logits.clone().requires_grad_()
    up = torch.randn(given.shape, generator=torch.Generator().manual_seed(1)).to(given.dtype)

    def run() -> object:
        given.grad = None
        call(given).backward(up)
        return given.grad

    return run


def cases(options: Options) -> Iterator[Case]:
    """Forward, and forward with backward, for every chosen shape, dtype and thread count."""
    _, missing = peers.find("sinkhorn_knopp", options.peers)
    ours = partial(fusedopt.sinkhorn_knopp, iterations=ITERATIONS)
    for name in options.cases:
        detail, shape = CASES[name]
        for variant in options.dtypes:
            numbers = torch.Generator().manual_seed(0)
            logits = torch.randn(shape, generator=numbers).to(VARIANTS[variant])
            exact = torch.from_numpy(reference.sinkhorn_knopp(logits, iterations=ITERATIONS))
            expected = Expected.derive("P", pick([exact]), pick([plain(logits)]))
            for threads in options.threads:
                set_threads(threads)
                complaint = expected.complaint([ours(logits)])
                for what, bound in (("forward", partial), ("with backward", _with_gradient)):
                    yield Case(
                        name=f"{name} {what}",
                        variant=variant,
                        threads=threads,
                        contestants=[
                            Contestant("fusedopt", bound(ours, logits), "", complaint),
                            Contestant("torch eager", bound(plain, logits)),
                        ],
                        not_run=missing,
                        rounds=options.rounds or 15,
                        detail=f"{detail}, {ITERATIONS} iterations",
                    )
