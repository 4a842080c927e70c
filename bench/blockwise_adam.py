"""Blockwise Adam on the CPU: one optimizer step as a user calls it, against AdamW and Adam-mini.

The partitions are Adam-mini's: queries and keys by head, embeddings by token, other matrices by
output neuron, norms whole, biases by coordinate. Ours is checked against the float64 reference
before it is timed; the peers' blocks differ, so their answers are not compared. The floor is an
in-place loop that reads p, g, m and writes p, m over the same tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import peers
from bench.adamw import HYPER, VARIANTS, Shape, Variant, built
from bench.harness import floor
from bench.harness.answers import Expected, pick
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant
from fusedopt import reference
from fusedopt.partitions import Heads, Partition, Transposed

WIDTH, HEADS, LAYERS = 768, 12, 12
QKV: Any = [
    (slice(0, 768), Heads(n=HEADS)),
    (slice(768, 1536), Heads(n=HEADS)),
    (slice(1536, None), "row"),
]
_CHECKED = 1 << 17  # elements: larger tensors are not compared with the reference

Entry = tuple[str, Shape, Partition]


def _gpt2(inputs_first: bool) -> list[Entry]:
    """GPT-2 small, 148 tensors; ``inputs_first``: matrices as Hugging Face's Conv1D stores them."""

    def matrix(name: str, outputs: int, inputs: int, kind: Any) -> list[Entry]:
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        weight = Transposed(kind) if inputs_first else kind
        return [(f"{name}.weight", shape, weight), (f"{name}.bias", (outputs,), "coordinate")]

    def norm(name: str) -> list[Entry]:
        return [(f"{name}.weight", (WIDTH,), "tensor"), (f"{name}.bias", (WIDTH,), "coordinate")]

    entries: list[Entry] = [
        ("wte.weight", (50257, WIDTH), "row"),
        ("wpe.weight", (1024, WIDTH), "row"),
    ]
    for i in range(LAYERS):
        entries += norm(f"h.{i}.ln_1") + matrix(f"h.{i}.attn.c_attn", 3 * WIDTH, WIDTH, QKV)
        entries += matrix(f"h.{i}.attn.c_proj", WIDTH, WIDTH, "row") + norm(f"h.{i}.ln_2")
        entries += matrix(f"h.{i}.mlp.c_fc", 4 * WIDTH, WIDTH, "row")
        entries += matrix(f"h.{i}.mlp.c_proj", WIDTH, 4 * WIDTH, "row")
    return entries + norm("ln_f")


@dataclass(frozen=True)
class Workload:
    """Tensors with their names and partitions."""

    detail: str
    entries: Sequence[Entry]
    rounds: int


CASES = {
    "gpt2": Workload("GPT-2 small, 148 tensors, as nn.Linear stores them", _gpt2(False), 11),
    "gpt2-conv1d": Workload("GPT-2 small as Conv1D stores it: blocks are columns", _gpt2(True), 11),
    "64Mi-rows": Workload("65536 rows of 1024", [("w", (1 << 16, 1 << 10), "row")], 11),
    "5000x1000": Workload(
        "5000 matrices of 1 x 1000, by row", [(f"w{i}", (1, 1000), "row") for i in range(5000)], 15
    ),
}  # fmt: skip
QUICK = {"cases": ("gpt2", "5000x1000"), "dtypes": ("fp32",), "rounds": 5, "peers": ("torch",)}
__all__ = ["CASES", "QUICK", "VARIANTS", "cases"]


class Problem:
    """The tensors of one workload in one variant."""

    def __init__(self, workload: Workload, variant: Variant, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(shape: Shape, scale: float) -> Tensor:
            drawn = torch.randn(shape, generator=generator).mul_(scale)
            return drawn.to(device, variant.param)

        self.variant, self.device = variant, device
        self.names = [name for name, _, _ in workload.entries]
        self.kinds = [kind for _, _, kind in workload.entries]
        self.params = [Parameter(draw(shape, 0.02)) for _, shape, _ in workload.entries]
        self.grads = [draw(shape, 0.1) for _, shape, _ in workload.entries]
        self.start = [p.detach().clone() for p in self.params]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    @property
    def gigabytes(self) -> float:
        """Bytes that one step must read and write, in units of 1e9, without those of blocks."""
        per_element = 3 * self.variant.param.itemsize + 2 * self.variant.state.itemsize
        return 1e-9 * per_element * sum(p.numel() for p in self.params)

    def complaint(self, step: Callable[[], object]) -> str:
        """Two steps from the start against the float64 reference, for all but large tensors."""
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.params], self.start)
        for _ in range(2):
            step()
        small = [i for i, p in enumerate(self.params) if p.numel() <= _CHECKED]
        result: Any = [[self.start[i].double().cpu().numpy() for i in small]]
        result += [[0 * p for p in result[0]], [self._no_blocks(i) for i in small]]
        for number in (1, 2):
            result = reference.blockwise_adam_step(
                result[0], [self.grads[i].double().cpu().numpy() for i in small], *result[1:],
                partitions=[self.kinds[i] for i in small], step=number, **HYPER,
            )  # fmt: skip
        exact = pick([torch.as_tensor(p) for p in result.params])
        plain = exact.to(self.variant.param).double()  # rounding the answer: one ulp is added
        allowed = (
            4 * (plain - exact).abs().max() + 8 * exact.abs() * torch.finfo(self.variant.param).eps
        )
        expected = Expected("parameters", exact, allowed)
        return expected.complaint([self.params[i].detach().cpu() for i in small])

    def _no_blocks(self, i: int) -> Any:
        from fusedopt.partitions import block_count

        return torch.zeros(block_count(self.kinds[i], self.params[i].shape)).numpy()


def optimizer(problem: Problem) -> Contestant:
    """``optim.BlockwiseAdam``, its answer checked."""
    from fusedopt.optim import BlockwiseAdam

    kinds = dict(zip(problem.names, problem.kinds, strict=True))
    named = list(zip(problem.names, problem.params, strict=True))
    state_dtype = None if problem.variant.param == problem.variant.state else problem.variant.state
    made = BlockwiseAdam(named, **HYPER, partition=kinds, state_dtype=state_dtype)
    return Contestant("fusedopt", made.step, wrong=problem.complaint(made.step))


def peer_optimizer(problem: Problem, peer: Any) -> Contestant:
    """A peer over the problem's parameters; its blocks are its own, so no answer is checked."""
    named = list(zip(problem.names, problem.params, strict=True))
    return Contestant(peer.name, peer.build(named, problem.variant.state, HYPER).step)


def _floor(problem: Problem, threads: int) -> Contestant:
    moments = [torch.zeros_like(p, dtype=problem.variant.state) for p in problem.params]
    return Contestant(
        floor.NAME, floor.read3_write2(problem.params, problem.grads, moments, threads)
    )


def _contestants(
    problem: Problem, threads: int, found: list[Any]
) -> tuple[list[Contestant], dict[str, str]]:
    """All that can run here, and why the others can't."""
    builders: dict[str, Callable[[], Contestant]] = {
        floor.NAME: partial(_floor, problem, threads),
        "fusedopt": partial(optimizer, problem),
        **{peer.name: partial(peer_optimizer, problem, peer) for peer in found},
    }
    return built(builders)


def cases(options: Options) -> Iterator[Case]:
    """Every chosen workload in every chosen variant and thread count, one in memory at a time."""
    wanted = None if options.peers is None else ("fusedopt", *options.peers)
    found, missing = peers.find("blockwise_adam", wanted)
    for name, key in itertools.product(options.cases, options.dtypes):
        workload, variant = CASES[name], VARIANTS[key]
        problem = Problem(workload, variant)
        for threads in options.threads:
            set_threads(threads)
            contestants, not_run = _contestants(problem, threads, found)
            set_threads(threads)
            yield Case(
                name=name,
                variant=variant.title,
                threads=threads,
                contestants=contestants,
                not_run=missing | not_run,
                rounds=options.rounds or workload.rounds,
                detail=workload.detail,
                work=problem.gigabytes,
                floor=floor.NAME,
            )
