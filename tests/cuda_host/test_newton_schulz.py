"""Newton–Schulz's CUDA kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from cuda_host import build as shim
from cuda_host.adam_arrays import CODES, SEEDS, launches, placed
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt import reference
from newton_schulz_cases import INPUTS, NUMPY, SETS, error, gauss, plain_error, ulp

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
KERNELS = sorted(shim.CSRC.glob("cuda/newton_schulz/*.cu"))
SOURCES = [*KERNELS, shim.HERE / "newton_schulz_entry.cu"]
METHODS = ["standard", "gram"]
HALF = ["bfloat16", "float16"]
# Every edge of the tiles of 64 and 128, of 8 elements in a row, and of the depth's steps.
SHAPES = [(9, 9), (15, 200), (63, 64), (64, 65), (66, 63), (72, 33), (128, 129), (130, 127)]


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "in_stride", "out_stride")),
        *((name, ctypes.c_uint8) for name in ("in_dtype", "out_dtype")),
        *((name, ctypes.c_int64) for name in ("in_column_stride", "out_column_stride")),
    ]

    @classmethod
    def of(cls, g, out):
        strides = [[stride // x.itemsize for stride in x.strides] for x in (g, out)]
        rows, columns = zip(*strides, strict=True)
        dtypes = CODES[g.dtype], CODES[out.dtype]
        return cls(g.ctypes.data, out.ctypes.data, *g.shape, *rows, *dtypes, *columns)


class Step(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_double) for name in "abc"), ("restart", ctypes.c_bool)]


class Call(ctypes.Structure):
    _fields_ = [
        ("matrices", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("steps_size", ctypes.c_int64),
        ("gram_from", ctypes.c_double),
        ("dtype", ctypes.c_uint8),
    ]


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.newton_schulz.restype = ctypes.c_char_p
    loaded.newton_schulz_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


def launch(library, pairs, coefficients="jordan", method="standard", dtype="float32", **options):
    """One call on (input, output) pairs; None, or what went wrong."""
    schedule = schedules.make(coefficients, 5, method, dtype, dtype, **options)
    matrices = (Matrix * len(pairs))(*(Matrix.of(g, out) for g, out in pairs))
    steps = (Step * len(schedule.steps))(*(Step(*step) for step in schedule.steps))
    call = Call(
        ctypes.addressof(matrices),
        len(pairs),
        ctypes.addressof(steps),
        len(steps),
        schedule.gram_from,
        CODES[NUMPY[schedule.dtype]],
    )
    size = library.newton_schulz_workspace(ctypes.byref(call))
    workspace = placed(np.full(size, 0xFF), np.dtype("uint8"))
    return library.newton_schulz(
        ctypes.byref(call), ctypes.c_void_p(workspace.ctypes.data), ctypes.c_void_p(0x1000)
    )


def run(library, inputs, **options):
    """The results of one call, each of its input's dtype."""
    outs = [placed(np.full(g.shape, np.nan), g.dtype) for g in inputs]
    assert launch(library, list(zip(inputs, outs, strict=True)), **options) is None
    return outs


def small(family):
    return min(INPUTS[family].shape) < 60 and INPUTS[family].ndim == 2


FEW = [family for family in INPUTS if small(family)]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges_of_tiles(library, shape, method, dtype, monkeypatch):
    """With every size of tile the same bits, and in every order of threads."""
    g = placed(gauss(*shape), NUMPY[dtype])
    want = reference.newton_schulz(g.astype(np.float64))
    results = []
    for index, multiprocessors in enumerate((1, 1000)):  # large tiles, small ones
        monkeypatch.setenv("CUDA_HOST_SMS", str(multiprocessors))
        monkeypatch.setenv("CUDA_HOST_SEED", str(SEEDS[(index + shape[1]) % len(SEEDS)]))
        results += run(library, [g], method=method, dtype=dtype)
    assert results[0].tobytes() == results[1].tobytes()
    bound = 2 * plain_error(g.astype(np.float64), "jordan", want, dtype=dtype) + 2 * ulp(dtype)
    if dtype == "float64":
        bound = 1e-11
    elif method == "gram":
        bound *= 2 if dtype in HALF else 100
    assert error(results[0].astype(np.float64), want) <= bound


def test_every_kernel_runs(library, monkeypatch):
    """No instance is left out."""
    for dtype in NUMPY:
        for method in METHODS:
            for multiprocessors in (1, 1000):
                monkeypatch.setenv("CUDA_HOST_SMS", str(multiprocessors))
                run(library, [placed(gauss(9, 11), NUMPY[dtype])], method=method, dtype=dtype)
    names = shim.kernels_declared(KERNELS)
    path = shim.build(SOURCES, sanitize="address" if ASAN else None)
    instances = shim.kernels_instantiated(path, names)
    assert len(instances) == 8 + 4 + 1 + 4 + 2 + 4 + 4
    assert instances <= set(library.cuda_host_kernels().decode().splitlines())
