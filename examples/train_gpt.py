"""Train a small byte-level GPT with torch's AdamW and with every optimizer of fusedopt.

    python examples/train_gpt.py [--out DIR] [--steps N] [--threads N] [--seed N]

All optimizers start from the same weights and see the same batches, and they take turns at every
step, so that whatever else the machine does meanwhile slows all of them alike. At the end: a table,
a plot and JSON.

To add an optimizer, add a row to ``OPTIMIZERS``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import digits
import torch
from gpt import (
    GPT,
    TRAIN_MODULES,
    VALIDATION_MODULES,
    GPTConfig,
    random_windows,
    read_modules,
)
from report import Result, print_table, print_transport, write_json, write_plot
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import fusedopt

BATCH = 8
VALIDATION_WINDOWS = 64
VALIDATIONS = 8  # measured before the first step, then this many times
ADAMW: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8}
MUON_LR = 0.02
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Row:
    """One optimizer of the demo.

    Attributes:
        label: its name in table and plot.
        build: makes it for a model: one optimizer, or several that share out the parameters.
        peer: its name in the column "vs ...", for an implementation to be compared with.
    """

    label: str
    build: Callable[[nn.Module], Sequence[Optimizer]]
    peer: str | None = None


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, vectors (gains and biases) do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def torch_adamw(model: nn.Module, **implementation: bool) -> list[Optimizer]:
    """torch's AdamW in one of its implementations."""
    return [torch.optim.AdamW(decay_groups(model), **ADAMW, **implementation)]


def fusedopt_adamw(model: nn.Module) -> list[Optimizer]:
    """fusedopt's AdamW."""
    return [fusedopt.optim.AdamW(decay_groups(model), **ADAMW)]


def fusedopt_blockwise_adam(model: nn.Module) -> list[Optimizer]:
    """fusedopt's blockwise Adam with the blocks of Adam-mini."""
    kinds = fusedopt.partitions.adam_mini(model, overrides={"*.mlp_*.weight": "row"})
    by_parameter = {p: kinds[name] for name, p in model.named_parameters()}
    return [fusedopt.optim.BlockwiseAdam(decay_groups(model), **ADAMW, partition=by_parameter)]


def fusedopt_muon(model: nn.Module, kind: str) -> list[Optimizer]:
    """fusedopt's Muon or NorMuon for the hidden matrices, AdamW for the rest, in one optimizer."""
    groups = fusedopt.param_groups_for(model, adamw=ADAMW)
    optimizer = getattr(fusedopt.optim, kind)
    return [optimizer(groups, lr=MUON_LR, weight_decay=WEIGHT_DECAY)]


OPTIMIZERS = [
    Row("torch AdamW, loop", partial(torch_adamw, foreach=False, fused=False), peer="loop"),
    Row("torch AdamW, foreach", partial(torch_adamw, foreach=True), peer="foreach"),
    Row("torch AdamW, fused", partial(torch_adamw, fused=True), peer="fused"),
    Row("fusedopt AdamW", fusedopt_adamw),
    Row("fusedopt BlockwiseAdam", fusedopt_blockwise_adam),
    Row("fusedopt Muon", partial(fusedopt_muon, kind="Muon")),
    Row("fusedopt NorMuon", partial(fusedopt_muon, kind="NorMuon")),
]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup over a tenth of the run, then a cosine from 1 down to 0.1."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


class Trainer:
    """One model with its optimizer, and what they measured."""

    def __init__(self, row: Row, model: GPT, steps: int) -> None:
        self.model = model
        self.optimizers = row.build(model)
        factor = partial(learning_rate_factor, steps=steps)
        self.schedules = [LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        self.result = Result(row.label, row.peer)

    def step(self, windows: Tensor) -> float:
        """Train on one batch, timing the optimizers alone; returns the loss before the step."""
        self.model.zero_grad()
        loss = self.model.loss(windows)
        loss.backward()
        value = loss.item()
        wait_for_device(windows.device)
        start = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        wait_for_device(windows.device)
        self.result.step_milliseconds.append(1e3 * (time.perf_counter() - start))
        for schedule in self.schedules:
            schedule.step()
        self.result.train_losses.append(value)
        return value

    @torch.no_grad()
    def validate(self, windows: Tensor) -> None:
        """Measure the validation loss as it stands now."""
        self.result.validation_steps.append(len(self.result.train_losses))
        self.result.validation_losses.append(self.model.loss(windows).item())

    def finish(self) -> Result:
        """The measurements, with the state's size."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
        self.result.state_bytes = sum(tensor.nbytes for tensor in tensors)
        return self.result


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_device() -> torch.device:
    """The GPU where torch and fusedopt can both use it, else the CPU."""
    usable = torch.cuda.is_available() and fusedopt.supports("adamw_step", device="cuda")[0]
    return torch.device("cuda" if usable else "cpu")


def train(trainers: Sequence[Trainer], batches: Tensor, validation: Tensor) -> None:
    """Train all models in lockstep; who goes first changes from step to step."""
    steps = len(batches)
    every = max(1, steps // VALIDATIONS)
    seconds = 0.1 if sys.stderr.isatty() else 10  # between two redraws; a log wants few
    for trainer in trainers:
        trainer.validate(validation)
    with tqdm(total=steps * len(trainers), unit="step", mininterval=seconds) as bar:
        for step, windows in enumerate(batches, start=1):
            first = step % len(trainers)
            for trainer in [*trainers[first:], *trainers[:first]]:
                loss = trainer.step(windows)
                bar.set_postfix_str(f"{trainer.result.label}, loss {loss:.3f}", refresh=False)
                bar.update()
            if step % every == 0 or step == steps:
                for trainer in trainers:
                    trainer.validate(validation)


def describe_backend(device: torch.device) -> str:
    """One line: which fusedopt this is, and what it runs on."""
    facts = fusedopt.env()
    backend = f"{device.type} ({facts['isa']})" if device.type == "cpu" else device.type
    return (
        f"fusedopt {facts['version']}, backend {backend}, on {hardware(device)} "
        "(python -m fusedopt env says more)"
    )


def describe_data(model: GPT, train_text: Tensor, validation_text: Tensor) -> str:
    """One line: the model, and how much it can read."""
    return (
        f"{model.describe()}, on the standard library's sources: {len(train_text) / 1e6:.2f} MB "
        f"to train on, {len(validation_text) / 1e6:.2f} MB held out"
    )


def hardware(device: torch.device) -> str:
    """The name of the hardware that trains, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{fusedopt.env()['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def describe_run(arguments: argparse.Namespace, device: torch.device, model: GPT) -> dict[str, Any]:
    """Everything that one needs to know to repeat the run."""
    return {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "batch": BATCH,
        "model": asdict(model.config) | {"parameters": model.parameter_count()},
        "data": {"train": TRAIN_MODULES.split(), "validation": VALIDATION_MODULES.split()},
        "optimizer": ADAMW | {"weight_decay": WEIGHT_DECAY, "muon_lr": MUON_LR},
        "device": device.type,
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "environment": fusedopt.env(),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help="training steps per optimizer")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    """Run the demo from the command line."""
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # fusedopt follows torch
    device, console = best_device(), Console()
    console.print(describe_backend(device), highlight=False, soft_wrap=True)

    torch.manual_seed(arguments.seed)
    model = GPT(GPTConfig()).to(device)
    length = model.config.context + 1
    train_text, validation_text = read_modules(TRAIN_MODULES), read_modules(VALIDATION_MODULES)
    seed = arguments.seed + 1
    batches = random_windows(train_text, (arguments.steps, BATCH), length, seed).to(device)
    validation = random_windows(validation_text, (1, VALIDATION_WINDOWS), length, seed)[0]
    console.print(
        describe_data(model, train_text, validation_text), highlight=False, soft_wrap=True
    )

    transport = digits.time_pairs()
    trainers = [Trainer(row, copy.deepcopy(model), arguments.steps) for row in OPTIMIZERS]
    train(trainers, batches, validation.to(device))
    results = [trainer.finish() for trainer in trainers]

    print_table(results, console)
    print_transport(transport, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot, data = arguments.out / "loss.png", arguments.out / "results.json"
    title = f"{model.describe()}, on Python's own sources\n{hardware(device)}"
    write_plot(results, title, plot)
    write_json(results, describe_run(arguments, device, model), data, transport)
    console.print(f"plot: {plot.resolve()}\nJSON: {data.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
