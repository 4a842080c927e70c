"""Blockwise Adam's CUDA kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import fusedopt
from cuda_host import build as shim
from cuda_host.adam_arrays import (
    BF16,
    CODES,
    COUNTERS,
    F16,
    F32,
    F64,
    FLOATS,
    MAX_ROLES,
    OPTIONS,
    SEEDS,
    DeviceNumber,
    Options,
    compare,
    copy_of,
    launches,
    placed,
)
from fusedopt import _C, reference
from fusedopt.partitions import Contiguous, Each, Heads, Transposed, block_count, block_ids, resolve

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
KERNELS = [
    shim.CSRC / f"cuda/{name}.cu"
    for name in ("adam_scalars", "adamw", "blockwise_adam", "device_number")
]
SOURCES = [*KERNELS, shim.HERE / "blockwise_adam_entry.cu"]
RUN_SEEDS = SEEDS[2:3] if ASAN else SEEDS  # ASan takes its time
SHAPES = [(0,), (), (1,), (3,), (31,), (33,), (4097,), (12, 1), (6, 35), (48, 67), (5, 3000)]
QKV = [(slice(0, 24), Heads(n=4)), (slice(24, 36), Heads(head_dim=3)), (slice(36, 48), "row")]
ANY = [  # partitions of any shape
    "coordinate",
    "tensor",
    "row",
    "column",
    "global",
    *(Contiguous(n) for n in (2, 3, 7, 8, 31, 32, 100, 1000, 2047, 4100)),
]
OWN = [  # partitions of their own shapes: blocks of several tiles, pieces, and strips of columns
    (QKV, (48, 67)),
    (Transposed(QKV), (67, 48)),
    (Transposed("row"), (67, 48)),
    (Transposed([(slice(0, 5), "column"), (slice(5, 48), "tensor")]), (67, 48)),
    (Transposed([(slice(0, 5), "coordinate"), (slice(5, 48), "tensor")]), (67, 48)),
    (Each(Transposed("row")), (3, 20, 33)),
    ("tensor", (3, 30_000)),
    (Contiguous(8192), (20_000,)),
    (Contiguous(8193), (20_000,)),
    (Contiguous(17_001), (50_003,)),
    ("column", (20_000, 2)),
    ("column", (9, 5001)),
    ("row", (40, 768)),
    ("row", (2, 9000)),
    (Transposed(Heads(n=2)), (40, 2600)),
    (Transposed("tensor"), (40, 2600)),
    (Transposed([(slice(0, 2300), "tensor"), (slice(2300, None), "row")]), (60, 2600)),
]
COMBINATIONS = [
    (p, g, m) for p, g in itertools.product(FLOATS, FLOATS) for m in dict.fromkeys((p, F32, BF16))
]
LAYOUTS = {
    "transposed": lambda x: x.T,
    "gaps": lambda x: x[..., ::2],
    "backward": lambda x: x[::-1],
    "permuted": lambda x: x.reshape(*x.shape[:-1], -1, 2).swapaxes(0, -1),
}

pytestmark = pytest.mark.skipif(
    "avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"
)


class Region(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("offset", "rows", "columns", "stride", "group", "first_block", "shared")
    ]


class BlockCopy(ctypes.Structure):
    _fields_ = [("value", ctypes.c_void_p), ("shared", ctypes.c_int64)]


class Arrays(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("data", "dtype", "numel", "layout", "layouts")),
        ("layouts_size", ctypes.c_int64),
        ("options", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("inv_grad_scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("regions", "region_starts", "copies")),
        ("copies_size", ctypes.c_int64),
    ]


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.blockwise_adam.restype = loaded.blockwise_adam_capturable.restype = ctypes.c_char_p
    loaded.blockwise_adam_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


@pytest.fixture(autouse=True)
def with_fma():
    before = _C.isa()
    _C.set_isa("avx2")
    yield
    _C.set_isa(before)


@pytest.fixture(params=RUN_SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(request.param))
    return request.param


# ---- calling the launchers


def regions_of(partition, shape, shared):
    """A tensor's regions as the binding makes them; `shared`: of a global partition."""
    first, result = 0, []
    for offset, rows, columns, stride, group in resolve(partition, shape):
        group = min(group, columns)
        if rows > 1 and columns == stride == group:
            rows, columns, group = 1, rows * columns, rows * columns
        region = Region(
            offset, rows, columns, stride if rows > 1 else columns, group, first,
            shared if partition == "global" else -1,
        )  # fmt: skip
        first += -(-columns // group)
        result.append(region)
    return result


def layout_of(roles):
    """A row's strides in elements, its axes in row-major order; None where it is flat."""
    if all(x.flags.c_contiguous for x in roles):
        return None
    strides = [[s // x.itemsize for s in x.strides] for x in roles]
    return [roles[0].ndim, *roles[0].shape, *itertools.chain(*strides), *[0] * roles[0].ndim]


class Capturable:
    """Numbers that lie on the device: arrays of one element, or None."""

    def __init__(self, lr, step, grad_scale=None, found_inf=None):
        self.lr, self.step, self.grad_scale, self.found_inf = lr, step, grad_scale, found_inf

    def __call__(self, library, arrays, workspace):
        def pack(numbers):
            return (DeviceNumber * len(numbers))(*map(DeviceNumber.of, numbers))

        counters = list({x.ctypes.data: x for x in self.step}.values())
        scale, found_inf = DeviceNumber.of(self.grad_scale), DeviceNumber.of(self.found_inf)
        return library.blockwise_adam_capturable(
            ctypes.byref(arrays), pack(self.lr), pack(self.step), pack(counters),
            ctypes.c_int64(len(counters)), ctypes.byref(scale), ctypes.byref(found_inf),
            workspace, None,
        )  # fmt: skip


def launch(
    library, rows, kinds, *, step=1, lr, betas, eps, weight_decay, maximize=False, grad_scale=1.0,
    shared=0, copies=(), capturable=None,
):  # fmt: skip
    """Runs a CUDA launcher over rows of [param, grad, exp_avg, block_sq].

    kinds, shared: each row's partition, and the block of a global one. copies: (block_sq, block) of
    tensors without a gradient. Returns the launcher's error, or None.
    """
    n = len(rows)
    data, dtype = np.zeros((n, MAX_ROLES), np.uint64), np.zeros((n, MAX_ROLES), np.uint8)
    numel, layout, layouts = np.zeros(n, np.int64), np.full(n, -1, np.int64), []
    regions, starts = [], [0]
    shared = np.broadcast_to(shared, n)
    for i, roles in enumerate(rows):
        data[i, :4] = [x.ctypes.data for x in roles]
        dtype[i, :4] = [CODES[x.dtype] for x in roles]
        numel[i] = roles[0].size
        if (record := layout_of(roles[:3])) is not None:
            layout[i] = len(layouts)
            layouts += record
        regions += regions_of(kinds[i], roles[0].shape, int(shared[i]))
        starts.append(len(regions))
    layouts, starts = np.array(layouts, np.int64), np.array(starts, np.int64)
    packed = (Region * len(regions))(*regions)
    held = (BlockCopy * len(copies))(*(BlockCopy(x.ctypes.data, b) for x, b in copies))
    lr, weight_decay, step = (np.broadcast_to(x, n) for x in (lr, weight_decay, step))
    options = (Options * n)(
        *(Options(lr[i], *betas, eps, weight_decay[i], maximize) for i in range(n))
    )
    steps = np.array(step, np.int64)
    arrays = Arrays(
        n, *(x.ctypes.data for x in (data, dtype, numel, layout, layouts)), layouts.size,
        ctypes.addressof(options), steps.ctypes.data, 1 / grad_scale,
        ctypes.addressof(packed), starts.ctypes.data, ctypes.addressof(held), len(copies),
    )  # fmt: skip
    count = ctypes.c_int64(n if capturable else 0)
    size = library.blockwise_adam_workspace(ctypes.byref(arrays), count)
    memory = np.full(size, 0xFF, np.uint8)  # NaN: what is read before it is written shows
    workspace = ctypes.c_void_p(memory.ctypes.data)
    if capturable is None:
        error = library.blockwise_adam(ctypes.byref(arrays), workspace, None)
    else:
        error = capturable(library, arrays, workspace)
    return error and error.decode()


# ---- what is to be expected


def make_row(rng, shape, dtypes, kind, offsets=(0,) * 4, decades=6):
    """Parameter, gradient, first moment, and a second moment for each block."""
    normal = lambda: rng.standard_normal(shape)  # noqa: E731
    values = [normal(), gradient(rng, shape, decades), 0.1 * normal()]
    second = np.full(1, 0.3) if kind == "global" else rng.standard_normal(block_count(kind, shape))
    return [
        placed(x, t, o)
        for x, t, o in zip([*values, second**2], (*dtypes, F32), offsets, strict=True)
    ]


def gradient(rng, shape, decades):
    return rng.standard_normal(shape) * 10 ** rng.uniform(-0.7 * decades, 0.3 * decades, shape)


def plain_step(rows, kinds, shared, step, lr, betas, eps, weight_decay, maximize, grad_scale):
    """The formula with each operation rounded to the working dtype, results to the arrays' own."""
    sums, sizes = {}, {}
    for i, (p, g, _, v) in enumerate(rows):
        work = F64 if p.dtype == F64 else F32
        key = ("global", shared[i]) if kinds[i] == "global" else i
        ids = block_ids(kinds[i], p.shape).reshape(-1)
        gradients = (g.astype(work) / work.type(-grad_scale if maximize else grad_scale)).reshape(
            -1
        )
        total = sums.setdefault(key, np.zeros(v.size, work))
        np.add.at(total, ids, np.square(gradients))
        sizes[key] = sizes.get(key, 0) + np.bincount(ids, minlength=v.size)
    for i, (p, g, m, v) in enumerate(rows):
        if not p.size:
            continue
        work = F64 if p.dtype == F64 else F32
        t = work.type
        key = ("global", shared[i]) if kinds[i] == "global" else i
        ids = block_ids(kinds[i], p.shape)
        gradients = g.astype(work) / t(-grad_scale if maximize else grad_scale)
        second = v.astype(work) * t(betas[1]) + sums[key] / t(sizes[key]) * t(1 - betas[1])
        first = m.astype(work) * t(betas[0]) + gradients * t(1 - betas[0])
        root = np.sqrt(second) / t((1 - betas[1] ** step[i]) ** 0.5) + t(eps)
        moved = first / root[ids] * t(lr[i] / (1 - betas[0] ** step[i]))
        p[...] = p.astype(work) * t(1 - lr[i] * weight_decay[i]) - moved
        m[...] = first
        v[...] = second


def exact_step(rows, kinds, shared, step, lr, **options):
    """The reference over rows of float64 arrays; every shared block is a call of its own."""
    weight_decay = options.pop("weight_decay")
    for block in sorted(set(shared)):
        chosen = [i for i in range(len(rows)) if shared[i] == block]
        result = reference.blockwise_adam_step(
            *([rows[i][role] for i in chosen] for role in range(4)),
            partitions=[kinds[i] for i in chosen],
            step=[step[i] for i in chosen],
            lr=[lr[i] for i in chosen],
            weight_decay=[weight_decay[i] for i in chosen],
            **options,
        )
        for i, p, m, v in zip(chosen, *result, strict=True):
            rows[i][0], rows[i][2], rows[i][3] = p, m, v


def ulp(value, dtype):
    info = ml_dtypes.finfo(dtype)
    return max(float(info.eps) * value, float(info.tiny) * float(info.eps))


def check_close(rows, rough, exact, kinds, steps, peaks):
    """Error at most twice the plain formula's and one ulp; of second moments, by block.

    peaks: each array's largest values of all steps, whose ulp counts.
    """
    for i, (got, plain, want) in enumerate(zip(rows, rough, exact, strict=True)):
        if not got[0].size:
            continue
        for role in (0, 2, 3):
            a, b, w = (np.asarray(x[role], np.float64) for x in (got, plain, want))
            scale = np.abs(w).reshape(-1) if role == 3 else 1.0
            error, allowed = (
                float(np.max(np.abs(x - w) / scale))
                for x in (a.reshape(w.shape), b.reshape(w.shape))
            )
            peak = 1.0 if role == 3 else peaks[i][role]
            bound = 2 * allowed + ulp(peak, got[role].dtype) + 8 * steps * ulp(peak, F64)
            assert error <= bound, (i, kinds[i], got[0].shape, role, error, bound)


def check(library, rows, kinds, *, steps=2, shared=0, seed=0, decades=6, copies=(), **changes):
    """Steps with new gradients against the reference."""
    options = {**OPTIONS, "maximize": False, "grad_scale": 1.0, **changes}
    n = len(rows)
    shared, lr, decay, begin = (
        list(np.broadcast_to(x, n))
        for x in (shared, options.pop("lr"), options.pop("weight_decay"), options.pop("step", 3))
    )
    rough = [[copy_of(x) for x in roles] for roles in rows]
    exact = [[x.astype(np.float64) for x in roles] for roles in rows]
    peaks = [[0.0] * 4 for _ in rows]
    rng = np.random.default_rng(seed)
    for number in range(steps):
        step = [t + number for t in begin]
        for own, plain, real in zip(rows, rough, exact, strict=True):
            if number:
                own[1][...] = gradient(rng, own[1].shape, decades)
            plain[1][...] = own[1]
            real[1] = own[1].astype(np.float64)
        every = {"step": step, "lr": lr, "weight_decay": decay, **options}
        error = launch(library, rows, kinds, shared=shared, copies=copies, **every)
        assert error is None
        plain_step(rough, kinds, shared, **every)
        exact_step(exact, kinds, shared, **every)
        for peak, real in zip(peaks, exact, strict=True):
            peak[:] = [
                max(a, float(np.abs(x).max(initial=0))) for a, x in zip(peak, real, strict=True)
            ]
    check_close(rows, rough, exact, kinds, steps, peaks)


def listed(case):
    """The partition and the shapes of one list."""
    return (case[0], [case[1]]) if isinstance(case, tuple) else (case, SHAPES)


# ---- tests


@pytest.mark.parametrize("case", ANY + OWN, ids=repr)
def test_partitions(library, case, monkeypatch):
    index = (ANY + OWN).index(case)
    monkeypatch.setenv("CUDA_HOST_SEED", str(SEEDS[index % len(SEEDS)]))
    rng = np.random.default_rng(index)
    kind, shapes = listed(case)
    rows = [make_row(rng, shape, (F32,) * 3, kind, decades=12) for shape in shapes]
    check(library, rows, [kind] * len(rows), steps=5, decades=12)


@pytest.mark.parametrize(
    "index", range(0, len(COMBINATIONS), 7 if ASAN else 1), ids=lambda i: f"dtypes{i}"
)
def test_dtypes(library, index, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(SEEDS[index % len(SEEDS)]))
    rng = np.random.default_rng(index)
    dtypes = COMBINATIONS[index]
    kinds = ["row", "column", "tensor", "global", "coordinate", Contiguous(7), Contiguous(4100)]
    pairs = list(itertools.product(kinds, [(3,), (33,), (5, 67), (3, 2100), (5001,)]))
    rows = [make_row(rng, shape, dtypes, kind) for kind, shape in pairs]
    check(library, rows, [kind for kind, _ in pairs], maximize=True, grad_scale=8.0)


@pytest.mark.parametrize(
    "dtypes", COMBINATIONS[:: 7 if ASAN else 1], ids=lambda d: "-".join(map(str, d))
)
def test_coordinates_are_adamw_bit_for_bit(library, dtypes):
    """Flat, misaligned, and with strides, where another kernel runs."""
    rng = np.random.default_rng(0)
    slices = [(slice(0, 20), "coordinate"), (slice(20, 70), "coordinate")]
    rows, kinds = [], []
    for kind, shape in [("coordinate", (4097,)), ("coordinate", (70, 64)), (slices, (70, 64))]:
        offsets = [int(x) for x in rng.integers(0, 8, 4)]
        row = make_row(rng, shape, dtypes, "coordinate", offsets)
        rows += [row, [copy_of(row[0]).T.copy().T, *map(copy_of, row[1:])]]
        kinds += [kind, kind]
    want = [[copy_of(x) for x in roles] for roles in rows]
    options = {**OPTIONS, "maximize": True, "grad_scale": 3.0}
    for roles in want:
        lists = [[x] for x in (*roles[:3], roles[3].reshape(roles[0].shape))]
        fusedopt.adamw_step(*lists, step=7, backend="cpu", **options)
    assert launch(library, rows, kinds, step=7, **options) is None
    compare(rows, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F64,) * 3, (BF16, F32, F32)], ids=str)
def test_strides(library, dtypes, layout):
    """Blocks are those of row-major order, in all roles or only some."""
    rng = np.random.default_rng(0)
    rows, kinds = [], []
    slices = [(slice(0, 1), "coordinate"), (slice(1, 2), "column"), (slice(2, None), "row")]
    kinds_here = ["tensor", "row", "column", "global", Contiguous(7), Transposed("row")]
    for kind in [*kinds_here, *([slices] if layout != "permuted" else [])]:
        for some in (False, True):
            shape = LAYOUTS[layout](np.empty((64, 70))).shape
            row = make_row(rng, (64, 70), dtypes, "tensor")
            second = make_row(rng, shape, dtypes, kind)[3]
            views = [LAYOUTS[layout](x) for x in row[:3]]
            if some:
                views[1] = np.ascontiguousarray(views[1])
            rows.append([*views, second])
            kinds.append(kind)
    check(library, rows, kinds)


def test_offsets_beyond_32_bits(library):
    """Elements 8 GiB apart, in memory of which only the pages in use exist."""
    far = 2**31 + 5
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def spread(x):
        buffer = mmap.mmap(-1, (far + 1) * x.itemsize, flags=flags)
        out = np.ndarray(2, x.dtype, buffer, strides=(far * x.itemsize,))
        out[:] = x
        return out

    rng = np.random.default_rng(0)
    for kind in ("tensor", "coordinate"):
        row = make_row(rng, (2,), (F32,) * 3, kind)
        check(library, [[*map(spread, row[:3]), row[3]]], [kind], steps=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_misaligned(library, seed, dtype):
    """Every role at its own distance from a 16-byte boundary, or all at the same."""
    rng = np.random.default_rng(seed)
    rows, kinds = [], []
    shapes = [(Contiguous(3), (100,)), (Contiguous(9), (5, 500)), ("tensor", (4103,)),
              (Contiguous(8190), (9000,)), (Contiguous(8300), (17_000,)), ("column", (9, 41)),
              ("row", (5, 77))]  # fmt: skip
    for kind, shape in shapes:
        for same in (True, False):
            offsets = [int(x) for x in rng.integers(0, 8, 4)]
            rows.append(
                make_row(rng, shape, (dtype,) * 3, kind, offsets[:1] * 4 if same else offsets)
            )
            kinds.append(kind)
    check(library, rows, kinds)


def test_shared_blocks(library, seed):
    """Two blocks over several tensors each; a tensor without a gradient gets its block's value."""
    rng = np.random.default_rng(seed)
    shapes = [(33,), (5, 900), (40_001,), (2, 7), (1,)]
    rows = [make_row(rng, shape, (F32,) * 3, "global") for shape in shapes]
    rows.append(make_row(rng, (8, 9), (F64,) * 3, "global"))
    rows.append(make_row(rng, (8, 9), (F32,) * 3, "row"))
    shared = [0, 1, 0, 1, 0, 0, 0]
    copies = [(np.full(1, 0.3, F32), block) for block in (1, 0, 2)]
    check(library, rows, ["global"] * 6 + ["row"], shared=shared, copies=copies)
    assert copies[0][0] == rows[1][3] == rows[3][3] != np.float32(0.3)
    assert copies[1][0] == rows[0][3] == rows[2][3] == rows[4][3] == rows[5][3] != rows[1][3]
    assert copies[2][0] == np.float32(0.3)  # none of its tensors has a gradient


def mixed(rng, count):
    """Rows of every kind, way and dtype."""
    kinds = ["coordinate", "row", "column", "tensor", "global", Contiguous(9), Contiguous(9000)]
    rows, chosen = [], []
    for i in range(count):
        shape = (int(rng.integers(1, 60)), int(rng.integers(1, 60)))
        dtypes = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]
        row = make_row(rng, shape, dtypes, kinds[i % 7])
        if rng.random() < 0.2:
            row[:3] = [x.T.copy().T for x in row[:3]]
        rows.append(row)
        chosen.append(kinds[i % 7])
    return rows, chosen


@pytest.mark.parametrize(
    "count", [50] if ASAN else [50, 1000]
)  # the second: several launches of each kernel
def test_mixed_list_with_scalars_per_row(library, count):
    rng = np.random.default_rng(count)
    rows, kinds = mixed(rng, count)
    lr, decay = (list(rng.uniform(0.001, 0.1, count)) for _ in range(2))
    step = [1 + i % 100 for i in range(count)]
    check(library, rows, kinds, lr=lr, weight_decay=decay, step=step, steps=1)


@pytest.mark.parametrize("kind", ["row", "column", Contiguous(9000)], ids=repr)
def test_neighbours_alike_in_all_but_dtypes_or_scalars(library, kind):
    rng = np.random.default_rng(0)
    dtypes = [
        (F32,) * 3,
        (F32, F64, F32),
        (F64,) * 3,
        (F64, F32, F64),
        (BF16, F32, BF16),
        (F16,) * 3,
    ]
    rows = [make_row(rng, (130, 77), own, kind) for own in dtypes for _ in range(2)]
    lr = [0.01 * (1 + i // 4) for i in range(len(rows))]
    check(library, rows, [kind] * len(rows), lr=lr, steps=1)


def test_same_bits_in_any_order(library, monkeypatch):
    """Threads in whatever order, neighbours or none."""
    results = []
    for seed in (*SEEDS, 17):
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        rng = np.random.default_rng(0)
        rows, kinds = mixed(rng, 40)
        for kind, shape in [("tensor", (3, 30_000)), ("column", (300, 70)), ("row", (9, 4000))]:
            rows.append(make_row(rng, shape, (F32,) * 3, kind))
            kinds.append(kind)
        alone = [[copy_of(x) for x in roles] for roles in rows]
        assert launch(library, rows, kinds, **OPTIONS) is None
        results.append(rows)
    for other in results[1:]:
        compare(other, results[0])
    for roles, kind, want in zip(alone, kinds, results[0], strict=True):
        if kind == "global":
            continue
        assert launch(library, [roles], [kind], **OPTIONS) is None
        compare([roles], [want])


def capturable_case(rng, count):
    """Rows with numbers on the device, some of them shared, and what those numbers are."""
    rows, kinds = mixed(rng, count)
    lr = [np.array([x], F32) for x in rng.uniform(0.001, 0.1, count)]
    for i in range(0, count, 3):
        lr[i] = None
    taken = rng.integers(0, 1000, count)
    step = [np.array([n], COUNTERS[i % 4]) for i, n in enumerate(taken)]
    for i in range(4, count, 5):
        step[i] = step[i - 2]
    numbers = {
        "lr": [OPTIONS["lr"] if x is None else float(x[0]) for x in lr],
        "step": [int(x[0]) + 1 for x in step],
    }
    return rows, kinds, Capturable(lr, step), numbers


@pytest.mark.parametrize("count", [1, 60])
def test_capturable_gives_the_bits_of_the_other(library, seed, count):
    rows, kinds, capturable, numbers = capturable_case(np.random.default_rng(seed), count)
    capturable.grad_scale, capturable.found_inf = np.array([8.0], F32), np.array([0.0], F32)
    want = [[copy_of(x) for x in roles] for roles in rows]
    options = {**OPTIONS, "grad_scale": 8.0, **numbers}
    copies = [(np.full(1, 0.3, F32), 0)]
    assert launch(library, want, kinds, **options) is None
    assert launch(library, rows, kinds, capturable=capturable, copies=copies, **OPTIONS) is None
    compare(rows, want)
    assert [int(x[0]) for x in capturable.step] == numbers["step"]
    if count > 1:
        assert copies[0][0] == rows[4][3] != np.float32(0.3)


def test_found_inf_leaves_everything_alone(library, seed):
    rows, kinds, capturable, numbers = capturable_case(np.random.default_rng(seed), 30)
    capturable.found_inf = np.array([1.0], F32)
    rows[4][3][...] = 0.7  # not what the copy holds
    want = [[copy_of(x) for x in roles] for roles in rows]
    copies = [(np.full(1, 0.3, F32), 0)]
    assert launch(library, rows, kinds, capturable=capturable, copies=copies, **OPTIONS) is None
    compare(rows, want)
    assert copies[0][0] == np.float32(0.3)
    assert [int(x[0]) + 1 for x in capturable.step] == numbers["step"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_block(library, bad):
    """NaN goes everywhere in its block; Inf stops the others' steps and spoils its own moment."""
    rng = np.random.default_rng(0)
    for kind, shape in [("row", (9, 100)), ("column", (70, 30)), (Contiguous(9000), (20_000,))]:
        row = make_row(rng, shape, (F32,) * 3, kind)
        good = [copy_of(x) for x in row]
        at = row[0].size // 3
        row[1].reshape(-1)[at] = bad
        ids = block_ids(kind, shape).reshape(-1)
        block = ids == ids[at]
        for roles in (row, good):
            assert launch(library, [roles], [kind], **OPTIONS) is None
        p, m = row[0].reshape(-1), row[2].reshape(-1)
        np.testing.assert_array_equal(p[~block], good[0].reshape(-1)[~block])
        assert (~np.isfinite(row[3])).sum() == (~np.isfinite(m)).sum() == 1
        spoilt = ~np.isfinite(p)
        assert (spoilt == block).all() if math.isnan(bad) else spoilt.sum() == 1


def test_huge_gradients(library):
    """Squares beyond float32 still make a proper step: a block's sum and root are float64."""
    row = [np.full((64, 100), x, F32) for x in (0.0, 1e30, 0.0)] + [np.zeros(64, F32)]
    options = {**OPTIONS, "lr": 0.1, "weight_decay": 0.0}
    assert launch(library, [row], ["row"], **options) is None
    np.testing.assert_allclose(row[0], -0.1, rtol=1e-6)
    assert np.isinf(row[3]).all()


def test_nothing_to_do(library):
    launches(library)
    assert launch(library, [], [], **OPTIONS) is None
    empty = [np.zeros(0, F32)] * 3 + [np.zeros(0, F32)]
    assert launch(library, [empty], ["row"], **OPTIONS) is None
    copies = [(np.full(1, 0.3, F32), 0)]
    assert launch(library, [], [], copies=copies, **OPTIONS) is None
    assert copies[0][0] == np.float32(0.3)
    assert launches(library) == []


def test_elements_across_their_own_boundaries_are_refused(library):
    odd = np.zeros(9, np.uint8)[1:].view(F32)
    rows = [[np.ones(2, F32) for _ in range(4)], [np.ones(2, F32), odd, *np.ones((2, 2), F32)]]
    kinds = ["row", "row"]
    assert re.search("not a multiple", launch(library, rows, kinds, **OPTIONS))
    assert (rows[0][0] == 1).all()
    capturable = Capturable([None] * 2, [np.zeros(1)] * 2)
    assert re.search(
        "not a multiple", launch(library, rows, kinds, capturable=capturable, **OPTIONS)
    )
    assert capturable.step[0] == 0


def test_every_kernel_runs(library):
    """No instance of blockwise Adam's own kernels is left out."""
    rng = np.random.default_rng(0)
    rows, kinds = mixed(rng, 200)
    copies = [(np.full(1, 0.3, F32), 0)]
    assert launch(library, rows, kinds, copies=copies, **OPTIONS) is None
    assert (
        launch(
            library, rows[:1], kinds[:1], capturable=Capturable([None], [np.zeros(1)]), **OPTIONS
        )
        is None
    )
    names = shim.kernels_declared([shim.CSRC / "cuda/blockwise_adam.cu"])
    path = shim.build(SOURCES, sanitize="address" if ASAN else None)
    instances = shim.kernels_instantiated(path, names)
    assert len(instances) == len(names) + FURTHER_INSTANCES
    assert instances <= set(library.cuda_host_kernels().decode().splitlines())


FURTHER_INSTANCES = 6  # in double, and in units of two widths


def test_many_tensors_take_few_launches(library):
    rng = np.random.default_rng(0)
    rows = [make_row(rng, (3, 4), (F32,) * 3, "column") for _ in range(2000)]
    kinds = ["column"] * len(rows)
    launches(library)
    assert launch(library, rows, kinds, **OPTIONS) is None
    assert len(launches(library)) == 3 * 4  # 581 to a launch
    lr = list(rng.uniform(0.001, 0.1, len(rows)))
    assert launch(library, rows, kinds, **{**OPTIONS, "lr": lr}) is None
    assert len(launches(library)) == 3 * 15  # with scalars of their own 136


def test_no_races(monkeypatch):
    """No two threads touch the same byte without an order between them."""
    library = load("race")
    for seed in SEEDS[:3]:
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        rng = np.random.default_rng(seed)
        rows, kinds = mixed(rng, 30)
        for kind, shape in [("tensor", (20_001,)), ("row", (9, 700)), (Contiguous(5), (3000,))]:
            rows.append(make_row(rng, shape, (F32,) * 3, kind))
            kinds.append(kind)
        assert launch(library, rows, kinds, **OPTIONS) is None


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    left_out = ("asan", "races", "order", "nothing", "few_launches", "refused", "32_bits")
    chosen = " and ".join(f"not {name}" for name in left_out)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
