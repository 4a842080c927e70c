"""Rotate a problem's coordinates: Adam's progress is gone, that of one block for all stays.

    python examples/rotation.py [--out DIR]

Minimises ½ Σ hᵢ xᵢ² with curvatures hᵢ from 1e-4 to 1, once in its own coordinates and once in
coordinates rotated at random, which changes nothing but the axes. A second moment per coordinate
adapts to curvatures that lie along the axes; rotated, every axis mixes them all and there is
nothing to adapt to. A single second moment depends on the gradient's length alone, which no
rotation changes. Blocks that hold like with like do as well as one moment per coordinate. This is
the small form of the experiment of Xie, Mohamadi & Li (arXiv:2410.08198), who rotate GPT-2.

Prints a table and writes a plot; takes seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedopt
from fusedopt.partitions import Contiguous, Partition, block_count

Array = NDArray[np.float64]

SIZE = 200
STEPS = 300
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-20, "weight_decay": 0.0}
LEARNING_RATES = tuple(float(x) for x in np.logspace(-1, 1, 9))
PARTITIONS: tuple[tuple[str, Partition], ...] = (
    ("Adam: coordinate", "coordinate"),
    ("blocks of 10", Contiguous(10)),
    ("AdaSGD: global", "global"),
)


@dataclass(frozen=True)
class Problem:
    """½ Σ curvatures x², seen as a function of z with x = rotation z."""

    curvatures: Array
    rotation: Array
    start: Array

    def loss(self, z: Array) -> float:
        """The function's value."""
        return 0.5 * float(self.curvatures @ (self.rotation @ z) ** 2)

    def gradient(self, z: Array) -> Array:
        """Its gradient in z."""
        return self.rotation.T @ (self.curvatures * (self.rotation @ z))

    def hessian_norm(self) -> float:
        """Σ|H_ij| / size, which bounds Adam's progress; in the own axes, the mean curvature."""
        hessian = self.rotation.T @ (self.curvatures[:, None] * self.rotation)
        return float(np.abs(hessian).sum()) / len(hessian)


def problems(seed: int = 0) -> dict[str, Problem]:
    """The same problem from the same point, in its own coordinates and rotated."""
    rng = np.random.default_rng(seed)
    curvatures = np.sort(10.0 ** rng.uniform(-4, 0, SIZE))  # so that blocks hold like with like
    start = rng.standard_normal(SIZE)
    rotation, _ = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))
    return {
        "own axes": Problem(curvatures, np.eye(SIZE), start),
        "rotated": Problem(curvatures, rotation, rotation.T @ start),
    }


def losses(
    problem: Problem,
    partition: Partition,
    lr: float,
    step: Callable[..., Any] | None = None,
) -> list[float]:
    """The loss before each step and at the end, under a cosine schedule.

    ``step`` is ``fusedopt.blockwise_adam_step`` unless another is to be tried.
    """
    step = step or fusedopt.blockwise_adam_step
    z, m = problem.start.copy(), np.zeros(SIZE)
    v = np.zeros(block_count(partition, z.shape), np.float32)
    result = []
    for t in range(1, STEPS + 1):
        result.append(problem.loss(z))
        rate = lr * 0.5 * (1 + math.cos(math.pi * (t - 1) / STEPS))
        gradient = problem.gradient(z)
        step([z], [gradient], [m], [v], partitions=partition, step=t, lr=rate, **OPTIONS)
    return [*result, problem.loss(z)]


def best(problem: Problem, partition: Partition, **step: Any) -> list[float]:
    """The losses under the learning rate that ends lowest."""
    runs = (losses(problem, partition, lr, **step) for lr in LEARNING_RATES)
    return min(runs, key=lambda run: run[-1])


def write_plot(curves: Sequence[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    """One panel per system of coordinates, one curve per partition."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(9, 3.8), layout="constrained")
    for panel, axes in zip(panels, curves[0][1], strict=True):
        for (label, runs), color in zip(curves, ("#0072B2", "#E69F00", "#D55E00"), strict=True):
            panel.semilogy(runs[axes], color=color, label=label, linewidth=2)
        panel.set(title=axes, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[1].legend(loc="lower left", frameon=False)
    figure.suptitle(f"½ Σ hᵢ xᵢ², {SIZE} curvatures from 1e-4 to 1, best of {len(LEARNING_RATES)} "
                    "learning rates", fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the plot")
    out = parser.parse_args().out
    both = problems()
    curves = [(label, {axes: best(p, partition) for axes, p in both.items()})
              for label, partition in PARTITIONS]  # fmt: skip
    print(f"{'loss after ' + str(STEPS) + ' steps':<24}{'own axes':>12}{'rotated':>12}")
    for label, runs in curves:
        print(f"{label:<24}" + "".join(f"{run[-1]:>12.3g}" for run in runs.values()))
    print(
        f"{'sum of |H| / size':<24}" + "".join(f"{p.hessian_norm():>12.3g}" for p in both.values())
    )
    out.mkdir(parents=True, exist_ok=True)
    write_plot(curves, out / "rotation.png")
    print(f"plot: {out / 'rotation.png'}")


if __name__ == "__main__":
    main()
