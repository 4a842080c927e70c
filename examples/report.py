"""What the demo hands over: a table, a plot of the loss curves, and JSON with everything."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from digits import PAIRS, REG, SIDE, Timing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

FINAL_STEPS = 20  # one batch is noisy: the final training loss is the mean of this many
# Okabe and Ito's colours, told apart by colour-blind readers too; black and yellow left out.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vPX"


@dataclass
class Result:
    """What one optimizer did: losses in nats per byte, one training loss and time per step."""

    label: str
    peer: str | None
    train_losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    step_milliseconds: list[float] = field(default_factory=list)
    state_bytes: int = 0

    @property
    def final_train_loss(self) -> float:
        """Mean training loss of the last steps."""
        return statistics.fmean(self.train_losses[-FINAL_STEPS:])

    @property
    def final_validation_loss(self) -> float:
        """Validation loss after the last step."""
        return self.validation_losses[-1]

    @property
    def median_step(self) -> float:
        """Median time of the optimizer step alone, in milliseconds."""
        return statistics.median(self.step_milliseconds)

    def steps_to(self, loss: float) -> int | None:
        """The first step at which the smoothed training loss is this low; None: never."""
        reached = (i for i, value in enumerate(smooth(self.train_losses), 1) if value <= loss)
        return next(reached, None)

    def speedups(self, results: Sequence[Result]) -> dict[str, float]:
        """How many times faster than each of torch's own this step is, by the peer's name."""
        return {other.peer: other.median_step / self.median_step for other in results if other.peer}


def target_loss(results: Sequence[Result]) -> float:
    """The training loss, smoothed, at which the first optimizer ended."""
    return smooth(results[0].train_losses)[-1]


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print one line per optimizer."""
    peers = [result.peer for result in results if result.peer]
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Same start and batches for all; optimizers take turns at every step",
        caption="steps to: until the training loss is where the first one's ended\n"
        "step: median of optimizer.step() alone; vs: how many times faster",
    )
    table.add_column("\noptimizer", no_wrap=True)
    target = target_loss(results)
    headers = [
        "valid.\nloss",
        "train\nloss",
        f"steps\nto {target:.2f}",
        "step\nms",
        *(f"vs\n{peer}" for peer in peers),
    ]
    for header in [*headers, "state\nMB"]:
        table.add_column(header, justify="right")
    for result in results:
        speedups = result.speedups(results)
        table.add_row(
            result.label,
            f"{result.final_validation_loss:.3f}",
            f"{result.final_train_loss:.3f}",
            str(result.steps_to(target) or "never"),
            f"{result.median_step:.2f}",
            *(f"{speedups[peer]:.2f}" for peer in peers),
            f"{result.state_bytes / 1e6:.2f}",
        )
    console.print(table)


def print_transport(timings: Sequence[Timing], console: Console) -> None:
    """Print one line per solver of optimal transport."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"Optimal transport between {PAIRS} pairs of handwritten digits",
        caption=f"{SIDE} x {SIDE} pixels, squared distances, reg {REG:g} of the largest cost",
    )
    for header, justify in (("solver", "left"), ("ms", "right"), ("marginal error", "right")):
        table.add_column(header, justify=justify)
    table.add_column("time / ours", justify="right")
    for timing in timings:
        ratio = timing.seconds / timings[0].seconds
        table.add_row(
            timing.label, f"{1e3 * timing.seconds:.0f}", f"{timing.error:.1e}", f"{ratio:.2f}"
        )
    console.print(table)


def write_json(
    results: Sequence[Result], config: dict[str, Any], path: Path, transport: Sequence[Timing]
) -> None:
    """Write the configuration and every result, curves included."""
    rows = [
        asdict(result)
        | {
            "final_validation_loss": result.final_validation_loss,
            "final_train_loss": result.final_train_loss,
            "median_step_milliseconds": result.median_step,
            "times_faster_than": result.speedups(results),
            "target_loss": target_loss(results),
            "steps_to_target": result.steps_to(target_loss(results)),
        }
        for result in results
    ]
    everything = {"config": config, "results": rows, "transport": [asdict(t) for t in transport]}
    path.write_text(json.dumps(everything, indent=1) + "\n")


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, without the pull towards zero at its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def plot_losses(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the curves so that those that coincide show as stripes of all their colours."""
    dash, count = 4.0, len(results)
    for index, result in enumerate(results):
        color, losses = COLORS[index % len(COLORS)], smooth(result.train_losses)
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, linewidth=1.3, zorder=2)
        stripes = (-index * dash, (dash, dash * (count - 1))) if count > 1 else "solid"
        axes.plot(
            steps, losses, color=color, linewidth=3, ls=stripes, dash_capstyle="butt", zorder=3
        )
        axes.plot(
            result.validation_steps,
            result.validation_losses,
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=5 + 10 * (1 - (index + 1) / count),  # those that coincide are concentric
            markerfacecolor="none",
            markeredgecolor=color,
            markeredgewidth=1.5,
            zorder=4,
        )
    target = target_loss(results)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":", zorder=1)
    for index, result in enumerate(results):
        steps = result.steps_to(target)
        if steps is not None:
            axes.plot([steps], [target], "|", color=COLORS[index % len(COLORS)], markersize=24)
    style_loss_axes(axes)
    axes.legend(
        handles=legend_entries(results),
        title="optimizer: final validation loss",
        loc="upper right",
        fontsize=10,
    )


def style_loss_axes(axes: Axes) -> None:
    """Logarithmic loss with plain numbers, labels and a grid."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 2.5, 3, 4, 5, 6]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Training loss (smoothed lines) and validation loss (markers)", fontsize=12)
    axes.grid(alpha=0.3)


def legend_entries(results: Sequence[Result]) -> list[Line2D]:
    """One line with marker per optimizer, solid, with its final validation loss."""
    return [
        Line2D(
            [],
            [],
            color=COLORS[index % len(COLORS)],
            linewidth=3.0,
            marker=MARKERS[index % len(MARKERS)],
            markersize=8,
            markerfacecolor="white",
            label=f"{result.label}: {result.final_validation_loss:.3f}",
        )
        for index, result in enumerate(results)
    ]


def plot_step_times(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the median time of each optimizer's step as a bar."""
    times = [result.median_step for result in results]
    colors = [COLORS[index % len(COLORS)] for index in range(len(results))]
    bars = axes.barh([result.label for result in results], times, color=colors, height=0.6)
    axes.bar_label(bars, [f"{time:.2f} ms" for time in times], padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(times))
    axes.set_xlabel("milliseconds")
    axes.set_title("Optimizer step alone (median)", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def write_plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Write the loss curves, and the step times beside them, as a PNG."""
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(13, 6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        plot_losses(left, results)
        plot_step_times(right, results)
        figure.suptitle(title, fontsize=13)
        figure.savefig(path, dpi=130)
