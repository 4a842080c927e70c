"""Recognise handwritten digits by how far their ink has to move.

    python examples/digit_matching.py [--out DIR] [--known N] [--asked N]

Each of N unknown digits gets the label of the known one that is nearest by optimal transport of its
ink, and, to compare, by the difference of pixels (which does about as well here: all images are
centred and of one size). All pairs are one batch. Writes ``digits.png``: how the ink of one digit
moves to its match, and matches by both distances; takes seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from digits import SIDE, load_digits, solve_pairs
from numpy.typing import NDArray

Array = NDArray[np.float64]

REG = 0.02  # of the largest cost
SHOWN = 6


def transport_distances(asked: Array, known: Array) -> Any:
    """The result for every pair, all of the first unknown digit first."""
    pairs = np.repeat(asked, len(known), axis=0), np.tile(known, (len(asked), 1))
    return solve_pairs(*pairs, reg=REG)


def pixel_distances(asked: Array, known: Array) -> Array:
    """Euclidean distances between images."""
    return np.sqrt(((asked[:, None] - known) ** 2).sum(-1))


def draw_flow(axes: Any, a: Array, b: Array, plan: Array) -> None:
    """Two images side by side, with a line for every larger stream of ink."""
    gap = 2
    both = np.full((SIDE, 2 * SIDE + gap), np.nan)
    both[:, :SIDE], both[:, SIDE + gap :] = a.reshape(SIDE, SIDE), b.reshape(SIDE, SIDE)
    axes.imshow(both, cmap="Greys")
    for i, j in zip(*np.nonzero(plan > 0.15 * plan.max()), strict=True):
        ends = [divmod(int(k), SIDE) for k in (i, j)]
        axes.plot(
            [ends[0][1], ends[1][1] + SIDE + gap],
            [ends[0][0], ends[1][0]],
            color="#0072B2",
            alpha=float(plan[i, j] / plan.max()),
            linewidth=1,
        )
    axes.set_title("where the ink of a digit goes")


def write_picture(
    asked: Array, by_transport: Array, by_pixels: Array, plan: Array, title: str, path: Path
) -> None:
    """The flow of the first match, and the first matches by both distances."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(1 + 3, SHOWN, height_ratios=(3, 1, 1, 1))
    draw_flow(figure.add_subplot(grid[0, :]), asked[0], by_transport[0], plan)
    rows = (("unknown", asked), ("by transport", by_transport), ("by pixels", by_pixels))
    for row, (label, images) in enumerate(rows, start=1):
        for column in range(SHOWN):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(images[column].reshape(SIDE, SIDE), cmap="Greys")
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(label)
    for axes in figure.axes[:1]:
        axes.axis("off")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the picture")
    parser.add_argument("--known", type=int, default=60, help="digits with a label")
    parser.add_argument("--asked", type=int, default=60, help="digits without")
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    images, labels = load_digits()
    order = np.random.default_rng(1).permutation(len(images))
    known = order[: arguments.known]
    asked = order[arguments.known : arguments.known + arguments.asked]
    start = time.perf_counter()
    result = transport_distances(images[asked], images[known])
    seconds = time.perf_counter() - start
    distances = result.cost.reshape(len(asked), len(known))
    nearest = [d.argmin(1) for d in (distances, pixel_distances(images[asked], images[known]))]
    right = [int((labels[known][index] == labels[asked]).sum()) for index in nearest]
    print(
        f"{distances.size} pairs in {seconds:.2f} s, marginal error at most "
        f"{result.marginal_error.max():.1e}"
    )
    title = (
        f"right: {right[0]} of {len(asked)} by transport, {right[1]} by pixels, "
        f"with {len(known)} known digits"
    )
    print(title)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "digits.png"
    matches = [images[known][index[:SHOWN]] for index in nearest]
    plan = result[int(nearest[0][0])].plan()
    write_picture(images[asked][:SHOWN], *matches, plan, title, path)
    print(f"picture: {path.resolve()}")


if __name__ == "__main__":
    main()
