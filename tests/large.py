"""AdamW on more than 2³¹ elements, where 32-bit indices would wrap: ``make test-large``.

Needs 18 GB of memory, so it is no part of ``make test``. Every element must come out as in a small
array of the same values.
"""

import torch

import fusedopt

COUNT = 2**31 + 37
VALUES = {"param": 1.0, "grad": 0.5, "exp_avg": 0.25, "exp_avg_sq": 0.125}


def step(count: int) -> list[torch.Tensor]:
    arrays = [torch.full((count,), value, dtype=torch.bfloat16) for value in VALUES.values()]
    fusedopt.adamw_step(*([x] for x in arrays), step=3, lr=0.1, betas=(0.9, 0.9))
    return arrays


def main() -> None:
    for name, large, small in zip(VALUES, step(COUNT), step(64), strict=True):
        equal = sum(int((piece == small[0]).sum()) for piece in large.split(2**28))
        assert equal == COUNT, f"{name}: {COUNT - equal} elements differ"
        assert name == "grad" or float(small[0]) != VALUES[name]
    print(f"{COUNT} elements updated alike")


if __name__ == "__main__":
    main()
