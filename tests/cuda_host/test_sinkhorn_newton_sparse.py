"""Optimal transport's CUDA kernels, run on the CPU: truth, equal bits on all grids, sanitizers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cuda_host import build as shim
from fusedopt.references import sinkhorn_newton_sparse as reference

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
SOURCES = [shim.CSRC / "cuda/sinkhorn_newton_sparse.cu", shim.HERE / "sinkhorn_entry.cu"]
SEEDS = [2] if ASAN else [0, 1, 2]
FACTS = (
    "iterations", "error", "cost", "mass", "value", "converged",
    "least", "most", "nan", "minus_inf", "empty_row", "empty_column",
)  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("cost", ctypes.c_void_p),
        ("single", ctypes.c_bool),
        *((k, ctypes.c_int64) for k in ("problems", "n", "m", "problem_stride", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "reg")),
        ("tolerance", ctypes.c_double),
        ("max_iterations", ctypes.c_int64),
        *((name, ctypes.c_bool) for name in ("sinkhorn", "warm", "single_step")),
        *((name, ctypes.c_void_p) for name in ("f", "g", "trace")),
        ("trace_rows", ctypes.c_int64),
        ("facts", ctypes.c_void_p),
    ]


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.transport.restype = ctypes.c_char_p
    loaded.transport_workspace_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


def launch(
    library, cost, a, b, reg, *, tol=1e-8, max_iter=500, sinkhorn=False, g=None, single_step=False
):
    """Solves a batch; cost is (problems, n, m), its rows contiguous."""
    problems, n, m = cost.shape
    a, b, reg = (np.ascontiguousarray(x, dtype=float) for x in (a, b, reg))
    f = np.full((problems, n), np.nan)
    warm = g is not None
    g = np.array(g, dtype=float) if warm else np.full((problems, m), np.nan)
    trace, facts = np.full((problems, max_iter, 6), np.nan), np.full((problems, 12), np.nan)
    integers = (ctypes.c_int64(x) for x in (problems, n, m))
    size = library.transport_workspace_bytes(*integers)
    workspace = np.full(size + 128, 0xFF, np.uint8)  # NaN: what is read before it is written shows
    begin = -workspace.ctypes.data % 128
    strides = [s // cost.itemsize for s in cost.strides[:2]]
    batch = Batch(
        cost.ctypes.data, cost.dtype == np.float32, problems, n, m, *strides,
        *(x.ctypes.data for x in (a, b, reg)), tol, max_iter, sinkhorn, warm, single_step,
        *(x.ctypes.data for x in (f, g, trace)), max_iter, facts.ctypes.data,
    )  # fmt: skip
    address = ctypes.c_void_p(workspace[begin : begin + size].ctypes.data)
    error = library.transport(ctypes.byref(batch), address, None)
    assert error is None, error.decode()
    columns = dict(zip(FACTS, facts.T, strict=True))
    return SimpleNamespace(f=f, g=g, trace=trace, facts=facts, **columns)


def random(n, m, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return rng.random((n, m)), a / a.sum(), b / b.sum()


def one(problem):
    return tuple(x[None] for x in problem)


def error_of(cost, a, b, f, g, reg):
    with np.errstate(invalid="ignore"):
        plan = np.exp((f[:, None] + g - cost) / reg)
    return abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 31), (33, 32), (64, 64)])
def test_shapes(library, seed, shape, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
    cost, a, b = random(*shape)
    result = launch(library, *one((cost, a, b)), [0.02])
    assert result.converged == 1
    assert error_of(cost, a, b, result.f[0], result.g[0], 0.02) <= 1e-8
    exact = reference.sinkhorn_newton_sparse(cost, a, b, reg=0.02, tol=1e-11)
    assert abs(result.value[0] - exact.value) <= 1e-13
    assert abs(result.cost[0] - exact.cost) <= 1e-8


@pytest.mark.parametrize(("shape", "reg"), [((129, 130), 0.02), ((33, 523), 0.05)])
def test_a_grid_has_the_bits_of_a_block(library, shape, reg, monkeypatch):
    """A problem alone has the grid, of whatever size; in a batch it has a thread block."""
    cost, a, b = random(*shape)
    pair = launch(library, *(np.stack([x, x]) for x in (cost, a, b)), [reg, reg], tol=1e-4)
    library.cuda_host_take_launches()
    blocks = set()
    for processors in ("1", "3"):
        monkeypatch.setenv("CUDA_HOST_SMS", processors)
        alone = launch(library, *one((cost, a, b)), [reg], tol=1e-4)
        _, grid, *_, kind, _ = library.cuda_host_take_launches().decode().strip().split("\t")
        assert kind == "cooperative"
        blocks.add(grid)
        for i in range(2):
            np.testing.assert_array_equal(pair.f[i], alone.f[0])
            np.testing.assert_array_equal(pair.g[i], alone.g[0])
            np.testing.assert_array_equal(pair.facts[i], alone.facts[0])
            np.testing.assert_array_equal(pair.trace[i], alone.trace[0])
    assert len(blocks) == (2 if shape[1] > 512 else 1)


def test_more_problems_than_lanes(library):
    """A thread block takes one problem after the other."""
    cost, a, b = random(2, 3)
    count = 1026
    costs = np.tile(cost, (count, 1, 1)) * np.linspace(0.5, 1, count)[:, None, None]
    marginals = np.tile(a, (count, 1)), np.tile(b, (count, 1))
    result = launch(library, costs, *marginals, np.full(count, 0.5), max_iter=20)
    assert (result.converged == 1).all()
    alone = launch(library, costs[-1:], *one((a, b)), [0.5], max_iter=20)
    np.testing.assert_array_equal(result.facts[-1], alone.facts[0])
    np.testing.assert_array_equal(result.f[-1], alone.f[0])


def test_rows_that_do_not_fit_in_shared_memory(library, monkeypatch):
    """They lie in the workspace, which gives the same bits."""
    monkeypatch.setenv("CUDA_HOST_ARCH", "90")
    cost, a, b = random(3, 6200)
    shared = launch(library, *one((cost, a, b)), [0.5], tol=1e-3)
    assert int(launches(library)[-1][3]) == 2 * 8 * 6200
    monkeypatch.setenv("CUDA_HOST_ARCH", "86")
    spilled = launch(library, *one((cost, a, b)), [0.5], tol=1e-3)
    assert int(launches(library)[-1][3]) == 0
    np.testing.assert_array_equal(shared.facts, spilled.facts)
    np.testing.assert_array_equal(shared.g, spilled.g)


def launches(library):
    return [x.split("\t") for x in library.cuda_host_take_launches().decode().splitlines()]


def test_more_kept_entries_than_there_is_room_for(library):
    """A dense plan of a large problem: the threshold rises until they fit."""
    cost, a, b = random(257, 258)
    start = np.where(np.arange(258) % 2, 0.0, 0.1)[None]
    result = launch(
        library, *one((cost * 1e-3, a, b)), [0.2], g=start, single_step=True, max_iter=1, tol=0
    )
    kind, entries = result.trace[0, 0, [1, 3]]
    assert kind == 1 and 0 < entries <= 257 * 258 / 2 + 257


@pytest.mark.parametrize("single", [False, True])
def test_inspection(library, single):
    kind = np.float32 if single else np.float64
    cost = np.arange(12.0).reshape(1, 3, 4).astype(kind)
    a, b = np.full((1, 3), 1 / 3), np.full((1, 4), 1 / 4)

    def facts(change, reg=0.1):
        given = cost.copy()
        change(given[0])
        result = launch(library, given, a, b, [reg])
        assert result.facts[0, 5] == (given == cost).all() * (reg > 1e-6)
        return [float(result.facts[0, k]) for k in range(6, 12)]

    def setting(*places):
        def change(x):
            for where, value in places:
                x[where] = value

        return change

    assert facts(setting()) == [0, 11, -1, -1, -1, -1]
    assert facts(setting(), 1e-7) == [0, 11, -1, -1, -1, -1]
    assert facts(setting(((2, 1), np.nan), ((1, 3), np.nan)))[2:] == [7, -1, -1, -1]
    assert facts(setting(((2, 1), -np.inf), ((0, 1), -np.inf)))[3] == 1
    assert facts(setting((1, np.inf)))[2:] == [-1, -1, 1, -1]
    assert facts(setting(((slice(None), 2), np.inf)))[2:] == [-1, -1, -1, 2]


def test_no_races(monkeypatch):
    """No two threads touch the same byte without an order between them."""
    library = load("race")
    for seed in ("0", "2"):
        monkeypatch.setenv("CUDA_HOST_SEED", seed)
        for shape, reg in [((9, 40), 1e-3), ((129, 130), 0.05), ((33, 523), 0.2)]:
            cost, a, b = random(*shape)
            tol = 1e-8 if shape[0] == 9 else 1e-2
            assert launch(library, *one((cost, a, b)), [reg], tol=tol).converged == 1
        sinkhorn = launch(library, *one(random(9, 40)), [0.01], sinkhorn=True, tol=1e-3)
        assert sinkhorn.converged == 1


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    left_out = ("asan", "races", "lanes")
    chosen = " and ".join(f"not {name}" for name in left_out)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
