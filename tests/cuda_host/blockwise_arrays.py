"""Calls the CUDA launchers of blockwise Adam on the CPU, and says what is to be expected."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np

from cuda_host import build as shim
from cuda_host.adam_arrays import (
    BF16,
    CODES,
    F32,
    F64,
    FLOATS,
    MAX_ROLES,
    OPTIONS,
    DeviceNumber,
    Options,
    copy_of,
    placed,
)
from fusedopt import reference
from fusedopt.partitions import Contiguous, block_count, block_ids, resolve

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
KERNELS = [
    shim.CSRC / f"cuda/{name}.cu"
    for name in ("adam_scalars", "adamw", "blockwise_adam", "device_number")
]
SOURCES = [*KERNELS, shim.HERE / "blockwise_adam_entry.cu"]
COMBINATIONS = [
    (p, g, m) for p, g in itertools.product(FLOATS, FLOATS) for m in dict.fromkeys((p, F32, BF16))
]


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


def again_under_asan_and_ubsan(path, left_out):
    """Runs a file's tests once more, but for those with such words in their names."""
    chosen = " and ".join(f"not {name}" for name in ("asan", *left_out))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
