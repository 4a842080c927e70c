"""Plans of tiny matrices, CUDA's kernel run on the CPU, against autograd through the same steps."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cuda_host import build as shim
from cuda_host.adam_arrays import placed

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
SOURCES = [
    shim.CSRC / "cuda/sinkhorn_newton_sparse_tiny.cu",
    shim.HERE / "sinkhorn_tiny_entry.cu",
]
SIZES = [(1, 1), (2, 2), (4, 4), (3, 4), (4, 1), (5, 5), (8, 8), (2, 7), (8, 3), (7, 8)]
if ASAN:  # it takes its time
    SIZES = [(4, 4), (3, 4), (8, 8), (7, 8)]
DTYPES = [np.dtype("float32"), np.dtype("float64")]


class Plans(ctypes.Structure):
    _fields_ = [
        ("cost", ctypes.c_void_p),
        ("single", ctypes.c_bool),
        ("problems", ctypes.c_int64),
        ("n", ctypes.c_int),
        ("m", ctypes.c_int),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("reg", ctypes.c_double),
        ("iterations", ctypes.c_int),
        ("plan", ctypes.c_void_p),
    ]


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.tiny.restype = loaded.tiny_backward.restype = ctypes.c_char_p
    loaded.tiny_workspace_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


def run(library, cost, a, b, reg, iterations, upstream, offset=0):
    """The plan, and the cost's gradient; arrays start `offset` elements behind 16 bytes."""
    cost, upstream = (placed(x, cost.dtype, offset) for x in (cost, upstream))
    plan, gradient = (placed(np.full(cost.shape, np.nan), cost.dtype, offset) for _ in range(2))
    a, b = (None if x is None else x.astype(cost.dtype) for x in (a, b))
    address = lambda x: None if x is None else x.ctypes.data  # noqa: E731
    problems, n, m = cost.shape
    plans = Plans(
        address(cost), cost.itemsize == 4, problems, n, m, address(a), address(b), reg, iterations,
        address(plan),
    )  # fmt: skip
    assert library.tiny(ctypes.byref(plans), None) is None
    workspace = np.full(library.tiny_workspace_bytes(ctypes.byref(plans)), 0xFF, np.uint8)
    error = library.tiny_backward(
        ctypes.byref(plans),
        *(ctypes.c_void_p(address(x)) for x in (upstream, gradient, workspace)),
        None,
    )
    assert error is None
    return plan, gradient


def plain(cost, a, b, reg, iterations, upstream, dtype):
    """Steps and gradient by torch, in ``dtype``."""
    cost, a, b, upstream = (torch.tensor(x, dtype=dtype) for x in (cost, a, b, upstream))
    cost.requires_grad_()
    kernel = torch.exp(-cost / reg)
    u = torch.ones(len(a), dtype=dtype)
    for _ in range(iterations):
        v = b / (kernel.transpose(-1, -2) @ u[..., None])[..., 0]
        u = a / (kernel @ v[..., None])[..., 0]
    plan = u[..., None] * kernel * v[..., None, :]
    (plan * upstream).sum().backward()
    return plan.detach().numpy(), cost.grad.numpy()


def case(n, m, problems, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.2, rng.random(m) + 0.2
    shape = problems, n, m
    return rng.standard_normal(shape), a / a.sum(), b / b.sum(), rng.standard_normal(shape)


def check(got, exact, rough, dtype):
    """Within twice the error of the plain steps in the working dtype, and an ulp of the largest."""
    for x, want, near in zip(got, exact, rough, strict=True):
        largest = abs(want).max()
        error = 2 * abs(near - want).max() + np.finfo(dtype).eps * largest
        np.testing.assert_allclose(x, want, rtol=0, atol=error)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_against_autograd(library, size, dtype, offset, monkeypatch):
    for seed, problems in ((0, 1), (2, 37)):
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        cost, a, b, upstream = case(*size, problems, seed)
        cost, upstream, a, b = (x.astype(dtype) for x in (cost, upstream, a, b))
        for iterations in (3,) if ASAN else (1, 2, 20):
            exact = plain(cost, a, b, 0.7, iterations, upstream, torch.float64)
            rough = plain(cost, a, b, 0.7, iterations, upstream, torch.float32)
            if dtype == np.float64:  # what two orders of summing in double differ by, at most
                rough = [x + 4e-15 for x in exact]
            got = run(library, cost, a, b, 0.7, iterations, upstream, offset)
            check(got, exact, rough, dtype)


def test_uniform_marginals_and_hyper_connections(library):
    """By default 1/n and 1/m; with ones the plan is doubly stochastic."""
    cost, _, _, upstream = case(4, 4, 9)
    uniform = np.full(4, 0.25)
    ours = run(library, cost, None, None, 0.5, 20, upstream)
    for x, want in zip(ours, run(library, cost, uniform, uniform, 0.5, 20, upstream), strict=True):
        np.testing.assert_array_equal(x, want)
    plan, _ = run(library, cost, np.ones(4), np.ones(4), 1.0, 50, upstream)
    np.testing.assert_allclose(plan.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(plan.sum(2), 1, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_costs(library, dtype):
    """Rows and columns far apart, which plain scaling loses to underflow."""
    cost, a, b, upstream = (x.astype(dtype) for x in case(4, 4, 5))
    far = cost + np.array([0, 300, -200, 50])[:, None] + np.array([-900, 100, 0, 3])
    want = plain(cost.astype(float), a, b, 1.0, 20, upstream, torch.float64)[0]
    plan, _ = run(library, far.astype(dtype), a, b, 1.0, 60, upstream)
    np.testing.assert_allclose(plan, want, atol=1e-3 if dtype == np.float32 else 1e-4)


def test_zero_marginals_and_forbidden_pairs(library):
    cost, a, b, upstream = case(4, 3, 6)
    cost[:, 1, 2] = np.inf
    a[3] = b[0] = 0
    plan, gradient = run(library, cost, a / a.sum(), b / b.sum(), 0.5, 30, upstream)
    assert np.isfinite(plan).all() and np.isfinite(gradient).all()
    assert (plan[:, 3] == 0).all() and (plan[:, :, 0] == 0).all() and (plan[:, 1, 2] == 0).all()
    np.testing.assert_allclose(plan.sum(2), np.tile(a / a.sum(), (6, 1)), atol=1e-14)


def test_what_is_not_tiny_is_refused(library):
    for size in ((9, 2), (2, 9), (0, 2)):
        plans = Plans(None, True, 1, *size, None, None, 1.0, 20, None)
        assert b"up to 8 rows" in library.tiny(ctypes.byref(plans), None)
    nothing = Plans(None, True, 0, 4, 4, None, None, 1.0, 2, None)
    assert library.tiny(ctypes.byref(nothing), None) is None


def test_no_races():
    library = load("race")
    for size in ((4, 4), (7, 8)):
        cost, a, b, upstream = case(*size, 21)
        run(library, cost, a, b, 0.5, 3, upstream)


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", "not asan and not races", __file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
