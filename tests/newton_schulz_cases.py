"""Newton–Schulz's inputs of the numerics contract, and the plain formula that bounds errors."""

import ml_dtypes
import numpy as np

from fusedopt import _newton_schulz_schedule as schedules

SETS = ["jordan", "polar_express", "you", "cubic"]
NUMPY = {name: np.dtype(name) for name in ("float64", "float32", "float16")}
NUMPY["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def gauss(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def with_spectrum(values, columns, seed=0):
    n = len(values)
    left = np.linalg.qr(gauss(n, n, seed=seed))[0]
    right = np.linalg.qr(gauss(columns, n, seed=seed + 1))[0]
    return left * values @ right.T


def mixed_rows():
    return gauss(40, 60) * 10.0 ** np.linspace(-12, 12, 40)[:, None]


def spike():
    g = 1e-3 * gauss(48, 80)
    g[17, 31] = 1e3
    return g


def zero_rows():
    g = gauss(33, 70)
    g[[0, 5, 32]] = 0
    return g


FAMILIES = {
    "wide": lambda: gauss(64, 200),
    "tall": lambda: gauss(200, 64),
    "square": lambda: gauss(96, 96),
    "larger than a block": lambda: gauss(197, 401),
    "aspect 4, two slices deep": lambda: gauss(130, 520),
    "37 x 101": lambda: gauss(37, 101),
    "1001 x 3": lambda: gauss(1001, 3),
    "rank 1": lambda: np.outer(gauss(48), gauss(80, seed=1)),
    "all ones": lambda: np.ones((64, 256)),
    "rank n/2": lambda: gauss(48, 24) @ gauss(24, 80, seed=1),
    "equal rows": lambda: np.repeat(gauss(12, 80), 4, axis=0),
    "positive mean": lambda: gauss(64, 256) + 1,
    "zero": lambda: np.zeros((7, 9)),
    "zero rows": zero_rows,
    "1 x 1": lambda: gauss(1, 1),
    "1 x n": lambda: gauss(1, 77),
    "n x 1": lambda: gauss(77, 1),
    "1e-20": lambda: 1e-20 * gauss(32, 48),
    "1e-38": lambda: 1e-38 * (1 + np.abs(gauss(32, 48))),
    "1e20": lambda: 1e20 * gauss(32, 48),
    "1e38": lambda: 5e37 * np.clip(gauss(32, 48), -6, 6),
    "rows over 24 decades": mixed_rows,
    "condition 1e3": lambda: with_spectrum(np.logspace(0, -3, 48), 80),
    "condition 1e8": lambda: with_spectrum(np.logspace(0, -8, 48), 80),
    "orthogonal": lambda: with_spectrum(np.ones(48), 48),
    "spike": spike,
    "symmetric": lambda: gauss(50, 50) + gauss(50, 50).T,
    "conv 4-D": lambda: gauss(2, 16, 3, 5),
    "batch": lambda: gauss(3, 2, 20, 30),
}
INPUTS = {name: make().astype(np.float32) for name, make in FAMILIES.items()}
FEW = [  # where tensor cores are emulated
    *("wide", "square", "37 x 101", "1001 x 3", "rank 1", "all ones", "rank n/2", "equal rows"),
    *("positive mean", "zero rows", "1 x 1", "1e-38", "1e38", "rows over 24 decades"),
    *("condition 1e8", "spike", "symmetric", "batch"),
]


def rounded(x, dtype):
    return np.asarray(x).astype(NUMPY[dtype]).astype(np.float32)


def plain(g, coefficients, gram=False, dtype="float32"):
    """The formula, each product and sum rounded to ``dtype``, after a normalisation in float64."""
    if g.shape[-2] > g.shape[-1]:
        return plain(g.swapaxes(-1, -2), coefficients, gram, dtype).swapaxes(-1, -2)
    g = g.astype(np.float64)
    norm = np.linalg.norm(g, axis=(-2, -1), keepdims=True)
    x = rounded(np.divide(g, norm, out=np.zeros_like(g), where=norm > 0), dtype)
    identity = np.eye(x.shape[-2], dtype=np.float32)

    def mul(a, b):
        return rounded(a @ b, dtype)

    def step(r, a, b, c):
        return rounded(np.float32(b) * r + np.float32(c) * (r @ r), dtype), np.float32(a)

    triples = [s[:3] for s in schedules.make(coefficients, 5, "standard", dtype, dtype).steps]
    if not gram:
        for triple in triples:
            z, a = step(mul(x, x.swapaxes(-1, -2)), *triple)
            x = rounded(a * x + z @ x, dtype)
        return x
    r, q = mul(x, x.swapaxes(-1, -2)), identity
    for triple in triples:
        z, a = step(r, *triple)
        q = rounded(q @ z + a * q, dtype)
        rz = rounded(r @ z + a * r, dtype)
        r = rounded(z @ rz + a * rz, dtype)
    return mul(q, x)


def error(got, want):
    """Of the worst matrix in a batch, in the Frobenius norm relative to the exact one's."""
    size = np.linalg.norm(want, axis=(-2, -1))
    difference = np.linalg.norm(np.asarray(got, dtype=np.float64) - want, axis=(-2, -1))
    return np.max(difference / np.where(size > 0, size, 1), initial=0)


def plain_error(g, coefficients, want, **options):
    """The worst of three orders of the columns: one alone can be lucky where one value is all."""
    errors = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(g.shape[-1])
        mixed = plain(g[..., order], coefficients, **options)
        errors.append(error(mixed[..., np.argsort(order)], want))
    return max(errors)


def ulp(dtype):
    return float(ml_dtypes.finfo(NUMPY[dtype]).eps)
