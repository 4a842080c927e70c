"""Give one photograph the colours of another, by optimal transport between their pixels.

    python examples/color_transfer.py [--out DIR] [--pixels N] [--reg R]

Takes N pixels of each of scikit-learn's two sample photographs as points in the cube of colours,
and solves entropic optimal transport between them, both ways from one plan. A pixel moves to the
mean of the colours that its mass goes to; all others move like the nearest of those N. Writes
``colors.png`` with both photographs before and after; takes seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from digits import needs_scikit_learn
from numpy.typing import NDArray

import fusedopt

Array = NDArray[np.float64]


def load_photographs() -> list[Array]:
    """Two photographs with colours from 0 to 1; needs scikit-learn."""
    with needs_scikit_learn():
        from sklearn.datasets import load_sample_images
    return [image / 255 for image in load_sample_images().images]


def some_pixels(image: Array, count: int, seed: int) -> Array:
    """``count`` of an image's colours, drawn without replacement."""
    colors = image.reshape(-1, 3)
    return colors[np.random.default_rng(seed).choice(len(colors), count, replace=False)]


def nearest(colors: Array, among: Array) -> NDArray[np.int64]:
    """The index of the nearest of ``among`` for each colour, some thousands at a time."""
    squares = (among**2).sum(1) / 2
    parts = np.array_split(colors, max(1, len(colors) // 8192))
    return np.concatenate([np.argmin(squares - part @ among.T, axis=1) for part in parts])


def moved(image: Array, pixels: Array, targets: Array) -> Array:
    """The image, each colour displaced as the nearest of ``pixels`` is."""
    colors = image.reshape(-1, 3)
    shift = (targets - pixels)[nearest(colors, pixels)]
    return np.clip(colors + shift, 0, 1).reshape(image.shape)


def write_picture(images: list[Array], titles: list[str], path: Path) -> None:
    """Four images in two rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, image, title in zip(figure.subplots(2, 2).flat, images, titles, strict=True):
        axes.imshow(image)
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the picture")
    parser.add_argument("--pixels", type=int, default=1500, help="pixels taken of each image")
    parser.add_argument("--reg", type=float, default=5e-3, help="of squared distances of colours")
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    first, second = load_photographs()
    x, y = (
        some_pixels(image, arguments.pixels, seed) for seed, image in enumerate((first, second))
    )
    start = time.perf_counter()
    result: Any = fusedopt.ot.solve_sample(x, y, reg=arguments.reg)
    seconds = time.perf_counter() - start
    plan = result.plan
    forth = plan @ y / plan.sum(1)[:, None]
    back = plan.T @ x / plan.sum(0)[:, None]
    print(
        f"{len(x)} x {len(y)} pixels in {seconds:.2f} s, {result.log['niter']} iterations, "
        f"marginal error {result.log['err']:.1e}"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "colors.png"
    images = [first, second, moved(first, x, forth), moved(second, y, back)]
    titles = ["first", "second", "first in the second's colours", "second in the first's colours"]
    write_picture(images, titles, path)
    print(f"picture: {path.resolve()}")


if __name__ == "__main__":
    main()
