"""AdamW on the CPU: one optimizer step as a user calls it, against torch, DeepSpeed and others.

Every contestant works on the same parameters and gradients, and where the tensors are large on the
same states too, since page placement alone changes the speed of memory by a factor of two. In lists
of small tensors each optimizer keeps its states as it allocates them. The floor is an in-place loop
that reads p, g, m, v and writes p, m, v over the same tensors.
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
from bench.harness import floor
from bench.harness.answers import Expected, pick
from bench.harness.machine import set_threads
from bench.harness.options import Options
from bench.harness.timing import Case, Contestant

# Far from every value at which variants of the rule coincide.
HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}

Shape = tuple[int, ...]


def _gpt2_shapes() -> list[Shape]:
    """GPT-2 small: vocabulary 50257, context 1024, 12 layers of width 768, all with biases."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    layer: list[Shape] = [*norm]
    for rows, columns in ((width, 3 * width), (width, width)):
        layer += [(rows, columns), (columns,)]
    layer += norm
    for rows, columns in ((width, 4 * width), (4 * width, width)):
        layer += [(rows, columns), (columns,)]
    return [(50257, width), (1024, width), *12 * layer, *norm]


def _resnet50_shapes() -> list[Shape]:
    """ResNet-50: its 53 convolutions."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(planes, channels, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            shapes += [(4 * planes, channels, 1, 1)] if block == 0 else []
            channels = 4 * planes
    return shapes


@dataclass(frozen=True)
class Workload:
    """A list of tensors; ``share_state`` where they are large, see the module's docstring.

    ``offset``: where in its allocation each tensor begins, in elements.
    """

    detail: str
    shapes: Sequence[Shape]
    rounds: int
    share_state: bool = False
    param_format: torch.memory_format = torch.contiguous_format
    grad_format: torch.memory_format = torch.contiguous_format
    offset: int = 0


@dataclass(frozen=True)
class Variant:
    """The dtypes of a case: of parameters and gradients, and of the states."""

    title: str
    param: torch.dtype
    state: torch.dtype


CASES = {
    "64Mi": Workload("one tensor of 64Mi elements", [(1 << 26,)], rounds=15, share_state=True),
    "gpt2": Workload("GPT-2 small, 148 tensors", _gpt2_shapes(), rounds=11, share_state=True),
    "5000x1000": Workload("5000 tensors of 1000 elements", 5000 * [(1000,)], rounds=15),
    "500x64": Workload("500 tensors of 64 elements", 500 * [(64,)], rounds=30),
    "channels-last": Workload(
        "ResNet-50's 53 convolutions, channels-last",
        _resnet50_shapes(),
        rounds=15,
        share_state=True,
        param_format=torch.channels_last,
        grad_format=torch.channels_last,
    ),
    "layouts-differ": Workload(
        "ResNet-50's 53 convolutions, channels-last, with contiguous gradients",
        _resnet50_shapes(),
        rounds=15,
        share_state=True,
        param_format=torch.channels_last,
    ),
}
VARIANTS = {
    "fp32": Variant("fp32", torch.float32, torch.float32),
    "bf16": Variant("bf16", torch.bfloat16, torch.bfloat16),
    "mixed": Variant("bf16, states fp32", torch.bfloat16, torch.float32),
}
QUICK = {
    "cases": ("64Mi", "5000x1000", "500x64", "layouts-differ"),
    "dtypes": ("fp32", "bf16"),
    "rounds": 5,
    "peers": ("torch", "deepspeed"),
}


OWN = ", own states"  # where each optimizer allocates its states itself, as in a user's training


def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


class Problem:
    """The tensors of one workload in one variant, and the answer after two steps from the start."""

    def __init__(self, workload: Workload, variant: Variant, device: str = "cpu") -> None:
        self.workload, self.variant, self.device = workload, variant, device
        self.params = [Parameter(p) for p in self._draw(1, 0.02, workload.param_format)]
        self.grads = self._draw(2, 0.1, workload.grad_format)
        self.firsts, self.seconds = self._zeros(), self._zeros()
        self._start = [p.detach().clone() for p in self.params]
        self._memory = [p.data for p in self.params]
        self._set_grads()
        self._expected = self._expect()

    def _draw(self, seed: int, scale: float, layout: torch.memory_format) -> list[Tensor]:
        """Normal numbers: the same for every layout and, up to rounding, for every dtype."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator) for shape in self.workload.shapes)
        to = {"device": self.device, "dtype": self.variant.param, "memory_format": layout}
        return [self._moved(d.mul_(scale).to(**to)) for d in drawn]

    def _zeros(self) -> list[Tensor]:
        zeros = (torch.zeros_like(p, dtype=self.variant.state) for p in self.params)
        return [self._moved(z) for z in zeros]

    def _moved(self, tensor: Tensor) -> Tensor:
        """The same where the workload wants its tensors to begin."""
        if not self.workload.offset:
            return tensor
        memory = tensor.new_empty(tensor.numel() + self.workload.offset)
        return memory[self.workload.offset :].view(tensor.shape).copy_(tensor)

    def _set_grads(self) -> None:
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    @property
    def gigabytes(self) -> float:
        """Bytes that one step must read and write, in units of 1e9."""
        per_element = 3 * self.variant.param.itemsize + 4 * self.variant.state.itemsize
        elements = sum(param.numel() for param in self.params)
        return 1e-9 * float(per_element * elements)

    def _two_steps(
        self, dtype: torch.dtype, round_to: torch.dtype, hyper: dict[str, Any]
    ) -> list[Tensor]:
        """torch's plain loop over the checked elements: p, m and v after two steps in ``dtype``."""
        param = Parameter(pick(self._start).to(dtype))
        grad = pick(self.grads).to(dtype)
        optimizer = torch.optim.AdamW([param], **hyper, foreach=False)
        for factor in (1, 0.5):
            param.grad = factor * grad
            optimizer.step()
            param.data = param.data.to(round_to).to(dtype)
        state = optimizer.state[param]
        return [param.detach().to(round_to), state["exp_avg"], state["exp_avg_sq"]]

    def _expect(self) -> list[Expected]:
        """The float64 answer; the error allowed follows from the loop in the variant's dtypes.

        There the hyperparameters are rounded to float32 too, as a kernel may receive them.
        """
        rounded = {**HYPER, "betas": tuple(_float32(beta) for beta in HYPER["betas"])}
        exact = self._two_steps(torch.float64, torch.float64, HYPER)
        plain = self._two_steps(self.variant.state, self.variant.param, rounded)
        names = ("parameters", "first moments", "second moments")
        return list(itertools.starmap(Expected.derive, zip(names, exact, plain, strict=True)))

    def complaint(
        self, step: Callable[[], object], states: Callable[[], tuple[list[Tensor], list[Tensor]]]
    ) -> str:
        """Take two steps from the start, the second with halved gradients, and compare."""
        self.reset()
        step()
        torch._foreach_mul_(self.grads, 0.5)
        step()
        torch._foreach_mul_(self.grads, 2.0)
        self._require_own_memory()
        results: list[Any] = [self.params, *states()]
        complaints = map(Expected.complaint, self._expected, results)
        return next(filter(None, complaints), "")

    def _require_own_memory(self) -> None:
        """Refuse a step that has moved the parameters, after putting them back."""
        pairs = list(zip(self.params, self._memory, strict=True))
        if all(p.data_ptr() == m.data_ptr() and p.stride() == m.stride() for p, m in pairs):
            return
        for param, memory in pairs:
            param.grad = None
            param.data = memory
        self._set_grads()
        raise NotImplementedError("left out: it moves the parameters to other memory")

    def reset(self) -> None:
        """Parameters back to the start, the shared states to zero."""
        with torch.no_grad():
            torch._foreach_copy_(self._memory, self._start)
            torch._foreach_zero_(self.firsts)
            torch._foreach_zero_(self.seconds)


def _share_states(problem: Problem, peer: peers.OptimizerPeer, optimizer: Any) -> str:
    """Make ``optimizer`` use the problem's states; a note if it goes on with its own."""
    states = zip(problem.params, problem.firsts, problem.seconds, strict=True)
    for param, first, second in states:
        optimizer.state[param] |= {peer.first: first, peer.second: second}
    problem.reset()
    optimizer.step()
    used = all(first.any() for first in (problem.firsts[0], problem.firsts[-1]))
    return "" if used else "its own states"


def optimizer(problem: Problem, peer: peers.OptimizerPeer, own: bool = False) -> Contestant:
    """``peer`` over the problem's parameters, its answer checked; ``own``: on states of its own."""
    made = peer.build(problem.params, problem.variant.state, HYPER)

    def states() -> tuple[list[Tensor], list[Tensor]]:
        kept = [made.state[param] for param in problem.params]
        return [state[peer.first] for state in kept], [state[peer.second] for state in kept]

    wrong = problem.complaint(made.step, states)
    if own:
        return Contestant(peer.name + OWN, made.step, "states where it puts them", wrong)
    note = _share_states(problem, peer, made) if problem.workload.share_state else ""
    return Contestant(peer.name, made.step, note, wrong)


def functional(problem: Problem, backend: str | None = None) -> Contestant:
    """``fusedopt.adamw_step`` on lists that the caller keeps."""
    from fusedopt import adamw_step

    numbers = itertools.count(1)

    def step() -> None:
        adamw_step(
            problem.params,
            problem.grads,
            problem.firsts,
            problem.seconds,
            step=next(numbers),
            backend=backend,
            **HYPER,
        )

    wrong = problem.complaint(step, lambda: (problem.firsts, problem.seconds))
    name = f"fusedopt.adamw_step, {backend}" if backend else "fusedopt.adamw_step"
    return Contestant(name, step, wrong=wrong)


def _floor(problem: Problem, threads: int) -> Contestant:
    arrays = problem.params, problem.grads, problem.firsts, problem.seconds
    return Contestant(floor.NAME, floor.read4_write3(*arrays, threads))


def _contestants(
    problem: Problem, threads: int, found: list[peers.OptimizerPeer]
) -> tuple[list[Contestant], dict[str, str]]:
    """All that can run here, and why the others can't."""
    builders: dict[str, Callable[[], Contestant]] = {
        floor.NAME: partial(_floor, problem, threads),
        **{peer.name: partial(optimizer, problem, peer) for peer in found},
        "fusedopt.adamw_step": partial(functional, problem),
    }
    if problem.workload.share_state:
        builders |= {
            peer.name + OWN: partial(optimizer, problem, peer, own=True)
            for peer in found
            if peer.name in ("fusedopt", "torch fused")
        }
    return built(builders)


def built(
    builders: dict[str, Callable[[], Contestant]],
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that could be built, and why the others could not."""
    contestants, not_run = [], {}
    for name, build in builders.items():
        try:
            contestants.append(build())
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            not_run[name] = (str(error) or repr(error)).splitlines()[0]
    return contestants, not_run


def cases(options: Options) -> Iterator[Case]:
    """Every chosen workload in every chosen variant and thread count, one in memory at a time."""
    wanted = None if options.peers is None else ("fusedopt", *options.peers)
    found, missing = peers.find("adamw", wanted)
    for name, key in itertools.product(options.cases, options.dtypes):
        workload, variant = CASES[name], VARIANTS[key]
        problem = Problem(workload, variant)
        for threads in options.threads:
            set_threads(threads)
            contestants, not_run = _contestants(problem, threads, found)
            set_threads(threads)  # once more: a peer may have brought its own OpenMP runtime
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
