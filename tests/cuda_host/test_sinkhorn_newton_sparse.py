"""Optimal transport's CUDA kernels, run on the CPU: truth, the same bits on any grid, sanitizers."""

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
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 31), (33, 32), (64, 64), (40, 523)])
def test_shapes(library, seed, shape, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
    cost, a, b = random(*shape)
    result = launch(library, *one((cost, a, b)), [0.02])
    assert result.converged == 1
    assert error_of(cost, a, b, result.f[0], result.g[0], 0.02) <= 1e-8
    exact = reference.sinkhorn_newton_sparse(cost, a, b, reg=0.02, tol=1e-11)
    assert abs(result.value[0] - exact.value) <= 1e-13
    assert abs(result.cost[0] - exact.cost) <= 1e-8
