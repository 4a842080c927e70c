"""AdamW on NumPy arrays alone, on every instruction set; runs where torch is not installed."""

import os

import ml_dtypes
import numpy as np
import pytest

import fusedopt
from fusedopt import _C, reference

SIZES = [0, 1, 3, 31, 32, 33, 255, 4097, 10007]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def plain_step(p, g, m, v, step, dtype, work=None):
    """The formula in the arithmetic of the dtype: float32 for 16 and 32 bits, float64 for 64."""
    work = work or (np.float64 if dtype is np.float64 else np.float32)
    (b1, b2), lr = map(work, OPTIONS["betas"]), work(OPTIONS["lr"])
    p, g, m, v = (x.astype(work) for x in (p, g, m, v))
    m = b1 * m + (work(1) - b1) * g
    v = b2 * v + (work(1) - b2) * g * g
    c1, c2 = (work(1 - np.longdouble(b) ** step) for b in OPTIONS["betas"])
    root = np.sqrt(v / c2) + work(OPTIONS["eps"])
    p = p * (work(1) - lr * work(OPTIONS["weight_decay"])) - lr * (m / c1) / root
    return [x.astype(dtype) for x in (p, m, v)]


def make(rng, size, dtype):
    p, g = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    return p, g, np.zeros(size, dtype), np.zeros(size, dtype)


def error(got, want):
    return np.abs(got.astype(np.longdouble) - want).max(initial=0.0)


def ulp(values, dtype):
    """The spacing of the dtype at the largest value, and never less than its smallest number."""
    info = ml_dtypes.finfo(dtype)
    largest = np.abs(values).max(initial=0.0)
    return max(float(info.eps) * largest, float(info.smallest_subnormal))


def test_isas_are_those_expected():
    expected = os.environ.get("FUSEDOPT_EXPECT_ISAS")
    if expected:
        assert _C.available_isas() == expected.split(",")
    assert "portable" in _C.available_isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_twenty_steps_against_the_truth(isa, dtype):
    """Every size in one list; the error stays within twice that of the plain formula.

    The truth is the formula in long double; the float64 reference has to agree with it, too.
    """
    rng = np.random.default_rng(3)
    ours, plain, exact, float64 = [], [], [], []
    for n in SIZES:
        p, _, m, v = make(rng, n, dtype)
        ours.append([x.copy() for x in (p, m, v)])
        plain.append([x.copy() for x in (p, m, v)])
        exact.append([x.astype(np.longdouble) for x in (p, m, v)])
        float64.append([x.astype(np.float64) for x in (p, m, v)])
    for step in range(1, 21):
        grads = [rng.standard_normal(n).astype(dtype) for n in SIZES]
        p, m, v = (list(x) for x in zip(*ours, strict=True))
        fusedopt.adamw_step(p, grads, m, v, step=step, **OPTIONS)
        p, m, v = zip(*float64, strict=True)
        result = reference.adamw_step(p, grads, m, v, step=step, **OPTIONS)
        float64 = list(zip(*result[:3], strict=True))
        for i, g in enumerate(grads):
            p, m, v = plain[i]
            plain[i] = plain_step(p, g, m, v, step, dtype)
            p, m, v = exact[i]
            exact[i] = plain_step(p, g, m, v, step, np.longdouble, np.longdouble)
    for got, rough, middle, want in zip(ours, plain, float64, exact, strict=True):
        for role in range(3):
            bound = 2 * error(rough[role], want[role]) + ulp(want[role], dtype)
            assert error(got[role], want[role]) <= bound
            assert error(middle[role], want[role]) <= 40 * ulp(want[role], np.float64)


def test_step_counters_found_inf_and_grad_scale(isa):
    rng = np.random.default_rng(0)
    (p, g, m, v), counter = make(rng, 100, np.float32), np.zeros((), np.int64)
    scaled = g * np.float32(1024)
    q, s, t = p.copy(), m.copy(), v.copy()
    fusedopt.adamw_step([p], [g], [m], [v], step=1, **OPTIONS)
    fusedopt.adamw_step([q], [scaled], [s], [t], step=counter, grad_scale=1024.0, **OPTIONS)
    assert counter == 1
    for a, b in [(p, q), (m, s), (v, t)]:
        np.testing.assert_array_equal(a, b)  # a power of two scales without rounding
    fusedopt.adamw_step([q], [scaled], [s], [t], step=counter, found_inf=1.0, **OPTIONS)
    assert counter == 1
    np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("view", ["flipped", "every other", "transposed", "fortran", "offset"])
def test_views_give_the_bits_of_contiguous_arrays(isa, view):
    rng = np.random.default_rng(1)

    def laid_out(x):
        if view == "flipped":
            return x[::-1, ::-1].copy()[::-1, ::-1]
        if view == "every other":
            wide = np.zeros((x.shape[0], 2 * x.shape[1]), x.dtype)
            wide[:, ::2] = x
            return wide[:, ::2]
        if view == "transposed":
            return x.T.copy().T
        if view == "fortran":
            return np.asfortranarray(x)
        flat = np.zeros(x.size + 1, x.dtype)
        flat[1:] = x.ravel()
        return flat[1:].reshape(x.shape)

    arrays = [rng.standard_normal((37, 53)).astype(np.float32) for _ in range(3)]
    arrays.append(np.abs(rng.standard_normal((37, 53))).astype(np.float32))
    for strided in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        straight = [x.copy() for x in arrays]
        laid = [laid_out(x) if s else x.copy() for x, s in zip(arrays, strided, strict=True)]
        for p, g, m, v in (straight, laid):
            fusedopt.adamw_step([p], [g], [m], [v], step=3, **OPTIONS)
        for a, b in zip(straight, laid, strict=True):
            np.testing.assert_array_equal(a, b)


def test_read_only_and_overlapping_arrays_are_refused():
    p, g, m, v = make(np.random.default_rng(0), 64, np.float32)
    frozen = p.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[0\].*read-only"):
        fusedopt.adamw_step([frozen], [g], [m], [v], step=1)
    with pytest.raises(
        ValueError, match=r"exp_avgs\[0\] is written, but shares memory with params"
    ):
        fusedopt.adamw_step([p[:40]], [g[:40]], [p[24:]], [v[:40]], step=1)
    columns = np.zeros((64, 4), np.float32)
    a, b, c, d = columns.T  # interleaved, but apart: four columns of one matrix
    fusedopt.adamw_step([a], [b], [c], [d], step=1)
    with pytest.raises(ValueError, match=r"params\[0\].*share memory"):
        fusedopt.adamw_step(
            [np.lib.stride_tricks.as_strided(p, (8, 8), (4, 4))], [g.reshape(8, 8)],
            [m.reshape(8, 8)], [v.reshape(8, 8)], step=1,
        )  # fmt: skip
