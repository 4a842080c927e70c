"""Muon's CUDA kernels, run on the CPU, against the CPU backend: all but the products, bit for bit.

In the place of Newton–Schulz stands the CPU's. test_muon.py on a fake GPU has the whole step.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fusedopt
from cuda_host import build as shim
from cuda_host.adam_arrays import (
    BF16,
    CODES,
    F16,
    F32,
    F64,
    FLOATS,
    MAX_ROLES,
    SEEDS,
    DeviceNumber,
    compare,
    copy_of,
    launches,
    placed,
)
from fusedopt import _C, partitions
from fusedopt.partitions import Each, Heads, Transposed
from fusedopt.steps.muon import row_count

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
WAVE = 20_000  # elements, so that a step has several
KERNELS = [(shim.CSRC / "cuda/muon.cu", [f"-DFUSEDOPT_MUON_WAVE={WAVE}"])]
SOURCES = [*KERNELS, shim.HERE / "muon_entry.cu"]
SCALES = ("original", "match_rms_adamw", "spectral", "none")  # enum class MuonScale
OPTIONS = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8}
# Chunks of 4096, units of 4 and 8, pieces of lines (2048 of a row, 128 of a column), 256 lines.
SHAPES = [(1, 1), (1, 7), (7, 1), (12, 33), (31, 32), (64, 72), (9, 4, 3, 3), (3, 5001), (300, 30)]
QKV = [(slice(0, 8), Heads(n=2)), (slice(8, 12), "tensor"), (slice(12, 20), Heads(head_dim=4))]
COMBINATIONS = [
    (p, g, m) for p, g in itertools.product(FLOATS, FLOATS) for m in dict.fromkeys((p, F32, BF16))
]

pytestmark = pytest.mark.skipif(
    "avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"
)
normuon_too = pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])


class Options(ctypes.Structure):  # MuonDeviceOptions
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "weight_decay", "momentum", "beta2")),
        *((name, ctypes.c_bool) for name in ("nesterov", "sum_form", "maximize", "cautious")),
        *((name, DeviceNumber) for name in ("own_lr", "own_weight_decay", "own_momentum")),
    ]


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("row", "offset", "rows", "columns", "stride")),
        ("by_column", ctypes.c_bool),
        ("scale", ctypes.c_double),
        ("first_line", ctypes.c_int64),
    ]


class Arrays(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("data", "dtype", "numel", "layout", "layouts")),
        *((name, ctypes.c_int64) for name in ("layouts_size", "roles")),
        ("options", ctypes.c_void_p),
        ("inv_grad_scale", ctypes.c_double),
        *((name, DeviceNumber) for name in ("grad_scale", "found_inf")),
        ("matrices", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("narrow", "count")),
    ]


class Product(ctypes.Structure):  # NewtonSchulzMatrix
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "in_stride", "out_stride")),
        *((name, ctypes.c_uint8) for name in ("in_dtype", "out_dtype")),
        *((name, ctypes.c_int64) for name in ("in_column_stride", "out_column_stride")),
    ]


@ctypes.CFUNCTYPE(None, ctypes.POINTER(Product), ctypes.c_int64)
def orthogonalize(products, count):
    """The CPU's Newton–Schulz, in place."""
    for m in products[:count]:
        assert m.data == m.out and m.in_stride == m.out_stride == m.columns
        assert m.in_column_stride == m.out_column_stride == 1 and m.data % 64 == 0
        dtype, size = (F64 if m.in_dtype == CODES[F64] else F32), m.rows * m.columns
        memory = (ctypes.c_uint8 * (size * dtype.itemsize)).from_address(m.data)
        matrix = np.frombuffer(memory, dtype).reshape(m.rows, m.columns)
        matrix[...] = fusedopt.newton_schulz(matrix)


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.muon.restype = ctypes.c_char_p
    loaded.muon_workspace.restype = ctypes.c_int64
    loaded.muon_scale.restype = ctypes.c_double
    loaded.muon_orthogonalize(orthogonalize)
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


@pytest.fixture(autouse=True)
def with_fma():
    before, threads = _C.isa(), fusedopt.get_num_threads()
    _C.set_isa("avx2")
    fusedopt.set_num_threads(1)
    yield
    fusedopt.set_num_threads(threads)
    _C.set_isa(before)


@pytest.fixture(params=SEEDS[2:3] if ASAN else SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(request.param))
    return request.param


# ---- calling the launcher


def layout_of(roles):
    """A row's strides in elements, its axes in row-major order; None where it is flat."""
    if all(x.flags.c_contiguous for x in roles):
        return None
    strides = [[s // x.itemsize for s in x.strides] for x in roles]
    absent = [0] * roles[0].ndim
    return [roles[0].ndim, *roles[0].shape, *itertools.chain(*strides), *absent]


def matrices_of(library, index, kind, shape, adjust, axis):
    """A tensor's matrices as the binding makes them."""
    result, first = [], 0
    for m in partitions.matrices(kind, shape):
        by_column = m.transposed
        if axis == "short" and m.rows != m.columns:
            by_column = m.columns > m.rows
        sizes = ctypes.c_double(m.outputs), ctypes.c_double(m.inputs)
        scale = library.muon_scale(SCALES.index(adjust), *sizes)
        result.append(Matrix(index, *m[:4], by_column, scale, first))
        first += m.columns if by_column else m.rows
    return result


def launch(
    library, rows, kinds, *, lr, weight_decay, momentum, nesterov=True, momentum_form="ema",
    maximize=False, cautious_weight_decay=False, adjust_lr_fn="original", beta2=0.95, axis="row",
    grad_scale=1.0, found_inf=None,
):  # fmt: skip
    """Runs the CUDA launcher over rows of [param, grad, momentum(, row_sq)].

    Numbers that are arrays lie on the device. Returns the launcher's error, or None.
    """
    n = len(rows)
    data, dtype = np.zeros((n, MAX_ROLES), np.uint64), np.zeros((n, MAX_ROLES), np.uint8)
    numel, layout, layouts = np.zeros(n, np.int64), np.full(n, -1, np.int64), []
    narrow, wide = [], []
    for i, roles in enumerate(rows):
        data[i, : len(roles)] = [x.ctypes.data for x in roles]
        dtype[i, : len(roles)] = [CODES[x.dtype] for x in roles]
        numel[i] = roles[0].size
        if (record := layout_of(roles[:3])) is not None:
            layout[i] = len(layouts)
            layouts += record
        own = matrices_of(library, i, kinds[i], roles[0].shape, adjust_lr_fn, axis)
        (wide if roles[0].dtype == F64 else narrow).extend(own)
    layouts = np.array(layouts, np.int64)
    matrices = (Matrix * (len(narrow) + len(wide)))(*narrow, *wide)

    def of(x, i=None):
        x = x[i] if isinstance(x, list) else x
        there = isinstance(x, np.ndarray)
        return (0.0 if there else x), DeviceNumber.of(x if there else None)

    flags = (nesterov, momentum_form == "sum", maximize, cautious_weight_decay)
    options = (Options * n)()
    for i in range(n):
        values, numbers = zip(*(of(x, i) for x in (lr, weight_decay, momentum)), strict=True)
        options[i] = Options(*values, beta2, *flags, *numbers)
    scale, device_scale = of(grad_scale)
    arrays = Arrays(
        n, *(x.ctypes.data for x in (data, dtype, numel, layout, layouts)), layouts.size,
        len(rows[0]) if rows else 3, ctypes.addressof(options), 1 / scale if scale else 0.0,
        device_scale, DeviceNumber.of(found_inf), ctypes.addressof(matrices),
        len(narrow), len(matrices),
    )  # fmt: skip
    size = library.muon_workspace(ctypes.byref(arrays))
    memory = np.full(size, 0xFF, np.uint8)  # NaN: what is read before it is written shows
    error = library.muon(ctypes.byref(arrays), ctypes.c_void_p(memory.ctypes.data), None)
    return error and error.decode()


def expected(rows, kinds, **options):
    """What the CPU backend makes of copies of the rows."""
    want = [[copy_of(x) for x in roles] for roles in rows]
    step = fusedopt.normuon_step if len(rows[0]) == 4 else fusedopt.muon_step
    step(*map(list, zip(*want, strict=True)), partitions=kinds, ns_dtype="float32", backend="cpu",
         **options)  # fmt: skip
    return want


def make_row(rng, shape, dtypes=(F32,) * 3, normuon=True, kind="tensor", axis="row", offsets=None):
    values = [rng.standard_normal(shape) for _ in range(3)]
    offsets = offsets or (0,) * 4
    row = [placed(x, t, o) for x, t, o in zip(values, dtypes, offsets, strict=False)]
    if normuon:
        lines = rng.standard_normal(row_count(kind, shape, axis)) ** 2
        row.append(placed(lines, F32, offsets[3]))
    return row


def check(library, rows, kinds="tensor", **changes):
    kinds = kinds if isinstance(kinds, list) and len(kinds) == len(rows) else [kinds] * len(rows)
    options = {**OPTIONS, **changes}
    want = expected(rows, kinds, **options)
    grads = [copy_of(roles[1]) for roles in rows]
    assert launch(library, rows, kinds, **options) is None
    compare(rows, want)
    compare([[roles[1]] for roles in rows], [[g] for g in grads])


# ---- tests


@normuon_too
@pytest.mark.parametrize(
    "index", range(0, len(COMBINATIONS), 7 if ASAN else 1), ids=lambda i: f"dtypes{i}"
)
def test_dtypes(library, index, normuon, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(SEEDS[index % len(SEEDS)]))
    rng = np.random.default_rng(index)
    check(library, [make_row(rng, s, COMBINATIONS[index], normuon) for s in SHAPES])


@pytest.mark.parametrize("axis", ["row", "short"])
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False},
        {"momentum_form": "sum"},
        {"momentum_form": "sum", "nesterov": False},
        {"momentum": 0.3},
        {"cautious_weight_decay": True},
        {"maximize": True, "grad_scale": 8.0},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "spectral", "beta2": 0.3},
        {"adjust_lr_fn": "none", "weight_decay": 0.0},
    ],
    ids=str,
)
def test_options(library, options, axis):
    rng = np.random.default_rng(0)
    for dtypes in ((F32, F32, F32), (BF16, F32, BF16), (F64, F64, F64)):
        check(library, [make_row(rng, s, dtypes, axis=axis) for s in SHAPES], axis=axis, **options)


@normuon_too
@pytest.mark.parametrize("axis", ["row", "short"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (QKV, (20, 15)),
        (QKV, (20, 32)),
        (Heads(n=4), (256, 24)),
        (Each("tensor"), (4, 9, 14)),
        (Each(Transposed("tensor")), (4, 160, 9)),
        (Transposed("tensor"), (520, 72)),
        (Transposed("tensor"), (33, 12)),
        (Transposed(QKV), (16, 20)),
        (Transposed(Heads(n=2)), (40, 4200)),
        (Transposed(Heads(n=2)), (40, 34)),
    ],
    ids=str,
)
def test_partitions(library, kind, shape, axis, normuon):
    rng = np.random.default_rng(0)
    combinations = [(F32, F32, F32), (BF16, BF16, F32), (F64, F64, F64)]
    rows = [make_row(rng, shape, d, normuon, kind, axis) for d in combinations]
    check(library, rows, [kind] * len(rows), **({"axis": axis} if normuon else {}))


@normuon_too
@pytest.mark.parametrize("role", [0, 1, 2, None])
def test_strides_and_misaligned_views(library, role, normuon, seed):
    """One role laid out otherwise than the others, or all of them; flat, off 16-byte boundaries."""
    rng = np.random.default_rng(seed)
    rows, kinds = [], []
    for dtypes in ((F32, F32, F32), (BF16, F16, F32), (F64, F32, F64)):
        for kind, shape in (("tensor", (48, 72)), (QKV, (20, 24)), (Each("tensor"), (3, 8, 40))):
            for view in (lambda x: copy_of(x.T).T, lambda x: np.repeat(x, 2, -1)[..., ::2]):
                row = make_row(rng, shape, dtypes, normuon, kind)
                for i in range(3) if role is None else [role]:
                    row[i] = view(row[i])
                rows.append(row)
                kinds.append(kind)
            offsets = [int(x) for x in rng.integers(0, 8, 4)]
            rows.append(make_row(rng, shape, dtypes, normuon, kind, offsets=offsets))
            kinds.append(kind)
    check(library, rows, kinds)


def mixed(rng, count, normuon=True):
    """Rows of every dtype, many of one shape."""
    rows, kinds = [], []
    for i in range(count):
        shape = [(12, 16), (40, 24), (5, 7)][i // 3 % 3]
        kind = ["tensor", Transposed("tensor")][i // 30 % 2]
        dtypes = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))] if i % 2 else (F32,) * 3
        rows.append(make_row(rng, shape, dtypes, normuon, kind))
        kinds.append(kind)
    return rows, kinds


@normuon_too
def test_a_long_list_with_numbers_of_its_own(library, normuon):
    """Several waves, several launches of each kernel, several batches of options."""
    count = 100 if ASAN else 1300
    rng = np.random.default_rng(0)
    rows, kinds = mixed(rng, count, normuon)
    lr, decay = (list(map(float, rng.uniform(0.001, 0.1, count))) for _ in range(2))
    check(library, rows, kinds, lr=lr, weight_decay=decay)


@normuon_too
def test_numbers_on_the_device(library, normuon, seed):
    """The same bits as numbers from the host, where they are float32's."""
    rng = np.random.default_rng(seed)
    rows, kinds = mixed(rng, 20, normuon)
    lr = [float(F32.type(x)) for x in rng.uniform(0.001, 0.1, 20)]
    told = {"momentum": float(F32.type(0.85)), "weight_decay": 0.25, "grad_scale": 8.0}
    want = expected(rows, kinds, lr=lr, **told)
    there = {name: np.array([x], F32) for name, x in told.items()}
    there["found_inf"] = np.zeros(1, F32)
    lr = [x if i % 3 else np.array([x], F64) for i, x in enumerate(lr)]
    assert launch(library, rows, kinds, lr=lr, **there) is None
    compare(rows, want)


@normuon_too
def test_found_inf_leaves_everything_alone(library, normuon, seed):
    rng = np.random.default_rng(seed)
    rows, kinds = mixed(rng, 20, normuon)
    want = [[copy_of(x) for x in roles] for roles in rows]
    assert launch(library, rows, kinds, found_inf=np.array([2.0], F32), **OPTIONS) is None
    compare(rows, want)


def test_nan_and_inf_stay_in_their_matrix(library):
    rng = np.random.default_rng(0)
    for bad in (math.nan, math.inf):
        rows = [make_row(rng, (6, 12)) for _ in range(3)]
        rows[1][1][2, 3] = bad
        check(library, rows)
        assert np.isnan(rows[1][0]).all() and np.isfinite(rows[0][0]).all()


def test_few_launches(library):
    """583 matrices alike but for addresses: one launch before the products, one after."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, (3, 4), normuon=False) for _ in range(583)]
    launches(library)
    assert launch(library, rows, ["tensor"] * 583, **OPTIONS) is None
    assert len(launches(library)) == 2 + 2  # options: 369 to a launch
    lr = list(map(float, rng.uniform(0.001, 0.1, 583)))
    assert launch(library, rows, ["tensor"] * 583, **{**OPTIONS, "lr": lr}) is None
    assert len(launches(library)) == 2 + 2 * 2


def test_nothing_to_do(library):
    launches(library)
    assert launch(library, [], [], **OPTIONS) is None
    assert launches(library) == []


def test_elements_across_their_own_boundaries_are_refused(library):
    odd = np.zeros(17, np.uint8)[1:].view(F32).reshape(2, 2)
    rows = [[np.ones((2, 2), F32) for _ in range(3)], [np.ones((2, 2), F32), odd, odd]]
    assert re.search("not a multiple", launch(library, rows, ["tensor"] * 2, **OPTIONS))
    assert (rows[0][0] == 1).all()


def test_every_kernel_runs(library):
    rng = np.random.default_rng(0)
    for normuon in (False, True):
        rows, kinds = mixed(rng, 100, normuon)
        assert launch(library, rows, kinds, **OPTIONS) is None
    names = shim.kernels_declared([shim.CSRC / "cuda/muon.cu"])
    path = shim.build(SOURCES, sanitize="address" if ASAN else None)
    instances = shim.kernels_instantiated(path, names)
    assert len(instances) == len(names) + FURTHER_INSTANCES
    assert instances <= set(library.cuda_host_kernels().decode().splitlines())


FURTHER_INSTANCES = 5  # in double, and in units of two widths


def test_no_races(monkeypatch):
    """No two threads touch the same byte without an order between them."""
    library = load("race")
    for seed in SEEDS[:3]:
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        rows, kinds = mixed(np.random.default_rng(seed), 20)
        rows.append(make_row(np.random.default_rng(0), (3, 5001)))
        assert launch(library, rows, [*kinds, "tensor"], **OPTIONS) is None


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    left_out = ("asan", "races", "nothing", "few_launches", "refused")
    chosen = " and ".join(f"not {name}" for name in left_out)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
