"""AdamW's CUDA kernels, run on the CPU: bit for bit what the CPU backend computes."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import subprocess
import sys
import types

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

# A process has ASan from its start or not at all: this file runs itself once more under it.
SANITIZE = "address" if "libasan" in os.environ.get("LD_PRELOAD", "") else None
SOURCES = [
    shim.CSRC / "cuda/adam_scalars.cu",
    shim.CSRC / "cuda/adamw.cu",
    shim.CSRC / "cuda/device_number.cu",
    shim.HERE / "adamw_entry.cu",
]
SIZES = [0, 1, 3, 31, 32, 33, 255, 4097, 10007]
COMBINATIONS = [
    (p, g, *states)
    for p, g in itertools.product(FLOATS, FLOATS)
    for states in [(p, p), (F32, F32), (BF16, BF16), (F32, BF16)]
]
FORMATS = [  # as in adamw.cu
    (F32, F32, F32, F32),
    (F32, F32, BF16, BF16),
    (F32, BF16, F32, F32),
    (BF16, BF16, F32, F32),
    (BF16, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F16, F16, F16),
    (F16, F16, F32, F32),
    (F64, F64, F64, F64),
]
pytestmark = pytest.mark.skipif(
    "avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"
)


class Arrays(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("data", "dtype", "numel", "layout", "layouts")),
        ("layouts_size", ctypes.c_int64),
        ("options", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("inv_grad_scale", ctypes.c_double),
        ("shared_scalars", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def library():
    loaded = shim.load(shim.build(SOURCES, sanitize=SANITIZE))
    loaded.adamw.restype = loaded.adamw_capturable.restype = ctypes.c_char_p
    loaded.adamw_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(autouse=True)
def with_fma():
    before = _C.isa()
    _C.set_isa("avx2")
    yield
    _C.set_isa(before)


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(request.param))
    return request.param


# ---- both sides


def layout_of(roles):
    """A row's strides in elements, its axes sorted by the parameter's; None where it is flat."""
    param = roles[0]
    if all(x.flags.c_contiguous for x in roles):
        return None
    axes = sorted((d for d in range(param.ndim)), key=lambda d: -abs(param.strides[d]))
    strides = [[x.strides[d] // x.itemsize for d in axes] for x in roles]
    return [param.ndim, *(param.shape[d] for d in axes), *itertools.chain(*strides)]


def launch(
    library,
    rows,
    *,
    step=1,
    lr,
    betas,
    eps,
    weight_decay,
    maximize=False,
    grad_scale=1.0,
    capturable=None,
):
    """Runs a CUDA launcher over rows of 4 or 5 arrays. Returns its error, or None."""
    n = len(rows)
    data, dtype = np.zeros((n, MAX_ROLES), np.uint64), np.zeros((n, MAX_ROLES), np.uint8)
    numel, layout, layouts = np.zeros(n, np.int64), np.full(n, -1, np.int64), []
    for i, roles in enumerate(rows):
        data[i, : len(roles)] = [x.ctypes.data for x in roles]
        dtype[i, : len(roles)] = [CODES[x.dtype] for x in roles]
        numel[i] = roles[0].size
        if (record := layout_of(roles)) is not None:
            layout[i] = len(layouts)
            layouts += record + [0] * record[0] * (5 - len(roles))
    layouts = np.array(layouts, np.int64)
    shared = all(np.ndim(x) == 0 for x in (step, lr, weight_decay))
    lr, weight_decay, step = (np.broadcast_to(x, n) for x in (lr, weight_decay, step))
    options = (Options * n)(
        *(Options(lr[i], *betas, eps, weight_decay[i], maximize) for i in range(n))
    )
    steps = np.array(step, np.int64)
    address = [x.ctypes.data for x in (data, dtype, numel, layout, layouts)]
    scalars = ctypes.addressof(options), steps.ctypes.data, 1 / grad_scale, shared
    arrays = Arrays(n, *address, layouts.size, *scalars)
    if capturable is None:
        error = library.adamw(ctypes.byref(arrays), None)
    else:
        arrays.shared_scalars = 0
        error = capturable(library, arrays)
    return error and error.decode()


class Capturable:
    """Numbers that lie on the device: arrays of one element, or None."""

    def __init__(self, lr, step, grad_scale=None, found_inf=None, counters=None):
        self.lr, self.step, self.grad_scale, self.found_inf = lr, step, grad_scale, found_inf
        self.counters = counters or list({x.ctypes.data: x for x in step}.values())

    def replaces(self, options):
        """What the launcher is told from the host: no number that lies on the device."""
        numbers = {
            "lr": [
                rate if x is None else np.nan
                for x, rate in zip(self.lr, options["lr"], strict=True)
            ],
            "step": [-1] * len(self.step),
            "grad_scale": 1.0 if self.grad_scale is None else np.nan,
        }
        return {**options, **numbers}

    def __call__(self, library, arrays):
        def pack(numbers):
            return (DeviceNumber * len(numbers))(*map(DeviceNumber.of, numbers))

        counters = self.counters
        scale, found_inf = DeviceNumber.of(self.grad_scale), DeviceNumber.of(self.found_inf)
        workspace = np.empty(library.adamw_workspace(ctypes.c_int64(len(self.step))), np.uint8)
        return library.adamw_capturable(
            ctypes.byref(arrays),
            pack(self.lr),
            pack(self.step),
            pack(counters),
            ctypes.c_int64(len(counters)),
            ctypes.byref(scale),
            ctypes.byref(found_inf),
            ctypes.c_void_p(workspace.ctypes.data),
            None,
        )


def cpu_step(rows, *, step=1, **options):
    """The same on the CPU backend; rows with and without maxima go in lists of their own."""
    for roles in (4, 5):
        chosen = [i for i, row in enumerate(rows) if len(row) == roles]
        own = {
            name: [value[i] for i in chosen] if isinstance(value, list) else value
            for name, value in options.items()
        }
        if isinstance(step, list):
            own["step"] = [np.array([step[i] - 1]) for i in chosen]
        else:
            own["step"] = step
        lists = [[rows[i][role] for i in chosen] for role in range(roles)]
        maxima = lists[4] if roles == 5 else None
        fusedopt.adamw_step(*lists[:4], max_exp_avg_sqs=maxima, backend="cpu", **own)


def check(library, rows, capturable=None, **options):
    """One step on both sides, from the same values: every array must have the same bits."""
    options = {**OPTIONS, **options}
    want = [[copy_of(x) for x in roles] for roles in rows]
    cpu_step(want, **options)
    told = capturable.replaces(options) if capturable else options
    assert launch(library, rows, capturable=capturable, **told) is None
    compare(rows, want)


# ---- inputs


def make_row(rng, shape, dtypes, amsgrad=False, offsets=(0,) * 5):
    """Parameter, gradient (over eight decades), moments and perhaps maxima."""
    p, g, m, v = dtypes
    normal = lambda: rng.standard_normal(shape)  # noqa: E731
    values = [normal(), normal() * 10 ** rng.uniform(-4, 4, shape), 0.1 * normal(), normal() ** 2]
    row = [placed(x, t, o) for x, t, o in zip(values, (p, g, m, v), offsets[:4], strict=True)]
    return [*row, placed(normal() ** 2, v, offsets[4])] if amsgrad else row


# ---- tests


@pytest.mark.parametrize("index", range(len(COMBINATIONS)), ids=lambda i: f"dtypes{i}")
def test_dtypes_and_sizes(library, index, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(SEEDS[index % len(SEEDS)]))
    rng = np.random.default_rng(index)
    for amsgrad in (False, True):
        rows = [make_row(rng, n, COMBINATIONS[index], amsgrad) for n in SIZES]
        check(library, rows, step=3, maximize=amsgrad, grad_scale=1.0 + 7 * amsgrad)


def plain_step(row, work, *, step, lr, betas, eps, weight_decay, maximize, grad_scale):
    """The formula, each operation rounded to ``work``, results to the arrays' own dtypes."""
    (b1, b2), t = betas, work.type
    p, g, m, v, *u = (x.astype(work) for x in row)
    g = g / t(-grad_scale if maximize else grad_scale)
    m = m * t(b1) + g * t(1 - b1)
    v = v * t(b2) + g * g * t(1 - b2)
    u = [np.maximum(u[0], v)] if u else []
    root = np.sqrt(u[0] if u else v) / t((1 - b2**step) ** 0.5) + t(eps)
    p = p * t(1 - lr * weight_decay) - m / root * t(lr / (1 - b1**step))
    return [x.astype(own.dtype) for x, own in zip((p, row[1], m, v, *u), row, strict=True)]


def ulp(values, dtype):
    info = ml_dtypes.finfo(dtype)
    return max(float(info.eps) * float(np.abs(values).max()), float(info.tiny) * float(info.eps))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("amsgrad", "beta1"), [(False, 0.85), (True, 0.3)])
def test_steps_against_float64(library, amsgrad, beta1, capturable):
    """Error at most twice the plain formula's and one ulp: the CPU shares whatever is wrong here.

    Every usual mix of dtypes, eight steps, sizes with heads and tails.
    """
    rng = np.random.default_rng(0)
    kinds = [(dtypes, n) for dtypes in FORMATS for n in (1, 33, 300)]
    rows = [make_row(rng, n, dtypes, amsgrad) for dtypes, n in kinds]
    rough = [[x.copy() for x in row] for row in rows]
    exact = [[x.astype(F64) for x in row] for row in rows]
    counter = np.array([2.0])
    options = {**OPTIONS, "betas": (beta1, 0.97), "maximize": amsgrad, "grad_scale": 3.0}
    for step in range(3, 11):
        for row, plain, real, (dtypes, n) in zip(rows, rough, exact, kinds, strict=True):
            grad = make_row(rng, n, dtypes)[1]
            row[1][...] = grad * dtypes[1].type(0.01) if F16 in dtypes else grad  # F16 overflows
            plain[1], real[1] = row[1].copy(), row[1].astype(F64)
        numbers = Capturable([None] * len(rows), [counter] * len(rows)) if capturable else None
        options["step"] = step
        assert launch(library, rows, capturable=numbers, **options) is None
        result = reference.adamw_step(
            *([row[role] for row in exact] for role in range(4)),
            max_exp_avg_sqs=[row[4] for row in exact] if amsgrad else None, **options,
        )  # fmt: skip
        after = [result.params, result.exp_avgs, result.exp_avg_sqs]
        for i, row in enumerate(exact):
            row[0], row[2], row[3] = (role[i] for role in after)
            if amsgrad:
                row[4] = result.max_exp_avg_sqs[i]
            work = F64 if rows[i][0].dtype == F64 else F32
            rough[i] = plain_step(rough[i], work, **options)
    for row, plain, real, kind in zip(rows, rough, exact, kinds, strict=True):
        for role in (0, 2, 3, 4)[: 3 + amsgrad]:
            error, allowed = (
                float(np.abs(x[role].astype(F64) - real[role]).max()) for x in (row, plain)
            )
            bound = 2 * allowed + ulp(real[role], row[role].dtype) + 32 * ulp(real[role], F64)
            assert error <= bound, (kind, role)


def test_every_kernel_runs(library):
    """No instance of a kernel is left out: one row of each combination of dtypes reaches all."""
    rng = np.random.default_rng(0)
    check(library, [make_row(rng, 300, dtypes) for dtypes in COMBINATIONS])
    rows, counter = [make_row(rng, 3, COMBINATIONS[0]) for _ in range(2)], np.zeros(1)
    check(library, rows, Capturable([None] * 2, [counter] * 2), lr=[0.02] * 2)
    path = shim.build(SOURCES, sanitize=SANITIZE)
    instances = shim.kernels_instantiated(path, KERNELS)
    assert len(instances) == 13
    assert instances == set(library.cuda_host_kernels().decode().splitlines())


KERNELS = shim.kernels_declared([shim.CSRC / "cuda/elementwise.cuh", *SOURCES])


def test_misaligned_rows(library, seed):
    """Every role at its own distance from a 16-byte boundary, most of them agreeing or none."""
    rng = np.random.default_rng(seed)
    rows = []
    for dtypes in [(F32,) * 4, (BF16,) * 4, (BF16, BF16, F32, F32), (F64,) * 4, (F16,) * 4]:
        for n in (1, 5, 9, 100, 4103):
            common = [int(rng.integers(8))] * 5
            own = [int(x) for x in rng.integers(0, 8, 5)]
            one_off = [*common[:4], common[4] + 1]
            for offsets in (common, own, one_off, one_off[::-1]):
                rows.append(make_row(rng, n, dtypes, bool(seed % 2), offsets))
    check(library, rows, step=2)


@pytest.mark.parametrize("length", range(1, 40))
def test_all_heads_and_tails(library, length):
    rng = np.random.default_rng(length)
    rows = [
        make_row(rng, length, (t,) * 4, True, (offset,) * 5) for t in FLOATS for offset in range(8)
    ]
    check(library, rows)


def test_layouts(library, seed):
    rng = np.random.default_rng(seed)
    layouts = [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[::-1],
        lambda x: x.reshape(-1, 2, x.shape[1] // 2).transpose(2, 0, 1),
        lambda x: x,
    ]
    rows = []
    for dtypes in [(F32,) * 4, (BF16, F32, F32, F32), (F64, F32, F64, F64)]:
        for view in layouts:
            row = [view(x) for x in make_row(rng, (70, 64), dtypes, bool(seed % 2))]
            rows.append(row)
            other = np.ascontiguousarray(row[1])  # the gradient in another order
            rows.append([copy_of(row[0]), other, *(copy_of(x) for x in row[2:])])
    check(library, rows, step=5)


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
    check(library, [[spread(x) for x in make_row(rng, 2, (F32,) * 4)]])


MANY = 2100
AT_MOST = 3  # launches: one for every 700


def many_rows(dtypes, amsgrad, view=lambda x: x):
    rng = np.random.default_rng(0)
    shapes = [int(n) for n in rng.integers(1, 5, MANY)]
    return [[view(x) for x in make_row(rng, n, dtypes, amsgrad)] for n in shapes]


def own_numbers(*names):
    """A number of its own for each tensor."""
    each = np.arange(1, MANY + 1)
    values = {"lr": 1e-5 * each, "weight_decay": 1e-4 * each, "step": each}
    return {name: list(values[name]) for name in names}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "numbers", [(), ("lr",), ("lr", "weight_decay"), ("step",), ("lr", "weight_decay", "step")]
)
def test_many_tensors_take_few_launches(library, numbers, amsgrad):
    rows = many_rows((F32,) * 4, amsgrad)
    launches(library)
    check(library, rows, **own_numbers(*numbers))
    assert len(launches(library)) <= AT_MOST + (amsgrad and "step" in numbers)  # there 654 fit


@pytest.mark.parametrize("dtypes", [(F32, F64, F32, F32), (BF16, BF16, F32, F32)], ids=str)
def test_many_tensors_of_other_dtypes(library, dtypes):
    launches(library)
    check(library, many_rows(dtypes, True), **own_numbers("lr"))
    assert len(launches(library)) <= AT_MOST


def test_many_tensors_in_float64(library):
    """Their own numbers take twice the room."""
    for numbers, rows_each in [((), 700), (("lr",), 680), (("lr", "step"), 580)]:
        rows = many_rows((F64,) * 4, False)
        launches(library)
        check(library, rows, **own_numbers(*numbers))
        assert len(launches(library)) <= -(-MANY // rows_each)


def test_many_tensors_of_the_same_strides(library):
    rows = many_rows((F32,) * 4, False, lambda x: np.repeat(x, 2)[::2])
    launches(library)
    rows = [row for row in rows if row[0].size == 3]
    check(library, rows, **own_numbers())
    assert len(launches(library)) == 1


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_counter_of_each_tensor_takes_one_launch_more(library, amsgrad):
    """It advances the counters on the way."""
    rows = many_rows((F32,) * 4, amsgrad)
    counters = [np.array([i % 50], F32) for i in range(MANY)]
    steps, rates = [1 + i % 50 for i in range(MANY)], [OPTIONS["lr"]] * MANY
    launches(library)
    check(library, rows, Capturable([None] * MANY, counters), step=steps, lr=rates)
    assert len(launches(library)) <= AT_MOST + 1
    assert [int(x[0]) for x in counters] == steps


@pytest.mark.parametrize("order", ["shared", "backward"])
def test_counters_that_are_not_each_tensors_own(library, order):
    """Who reads one can't advance it: another thread may read it too."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 3, (F32,) * 4) for _ in range(300)]
    counters = [np.array([i], F32) for i in range(150)]
    own = [counters[i // 2] for i in range(300)] if order == "shared" else [*counters, *counters]
    numbers = Capturable([None] * 300, own)
    check(library, rows, numbers, step=[1 + int(x[0]) for x in own], lr=[OPTIONS["lr"]] * 300)
    assert [int(x[0]) for x in counters] == list(range(1, 151))


def test_a_counter_that_no_tensor_names_counts_too(library):
    """As many counters as tensors, and yet two share one."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 3, (F32,) * 4) for _ in range(2)]
    one, other = np.array([4], F32), np.array([9], F32)
    numbers = Capturable([None] * 2, [one, one], counters=[one, other])
    check(library, rows, numbers, step=[5, 5], lr=[OPTIONS["lr"]] * 2)
    assert (one, other) == (5, 10)


class Elsewhere:
    """An array that says it lies beyond 48 bits."""

    def __init__(self, like):
        self.dtype, self.size, self.flags = like.dtype, like.size, like.flags
        self.ctypes = types.SimpleNamespace(data=like.ctypes.data + 2**52)


def test_addresses_of_more_than_48_bits_are_refused(library):
    row = [np.ones(2, F32) for _ in range(4)]
    rows = [[row[0], Elsewhere(row[1]), *row[2:]]]
    assert re.search("more than 48 bits", launch(library, rows, **OPTIONS))
    numbers = Capturable([None], [np.zeros(1)])
    assert re.search("more than 48 bits", launch(library, rows, capturable=numbers, **OPTIONS))
    assert numbers.step[0] == 0 and (row[0] == 1).all()


@pytest.mark.parametrize("dtypes", FORMATS, ids=lambda d: "-".join(map(str, d[1:])))
def test_usual_dtypes_have_a_kernel_of_their_own(library, dtypes):
    """The kernel for any row would be right too: only the launch tells which it was."""
    rng = np.random.default_rng(0)
    launches(library)
    check(library, [make_row(rng, 100, dtypes), make_row(rng, 99, dtypes, offsets=(1,) * 5)])
    check(library, [make_row(rng, 100, dtypes, amsgrad=True)])
    assert [re.search(r"\w+(?=<)", name)[0] for name in launches(library)] == [
        "elementwise_kernel"
    ] * 2


def test_scalars_of_some_rows(library):
    """Neighbours with the same numbers, with their own, and both in turn."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 3, (F32,) * 4) for _ in range(40)]
    own = [np.array([i], F32) for i in range(40)]
    counters = [
        own[0 if i < 5 else i if i < 20 else 20 + i % 3 if i < 30 else 30] for i in range(40)
    ]
    steps = [1 + int(x[0]) for x in counters]
    check(library, rows, Capturable([None] * 40, counters), step=steps, lr=[OPTIONS["lr"]] * 40)


def test_too_many_elements_are_refused(library):
    rows = [[np.lib.stride_tricks.as_strided(np.zeros(1, F32), (2**44,), (0,)) for _ in range(4)]]
    assert re.search("too many elements", launch(library, rows, **OPTIONS))


@pytest.mark.parametrize("on_the_device", [False, True])
def test_the_first_launch_that_fails_is_the_last(library, monkeypatch, on_the_device):
    """And its error is told, whichever it is."""
    rng = np.random.default_rng(0)
    count = 4500
    rows = [make_row(rng, 1, (F64 if i % 5 == 0 else F32,) * 4) for i in range(count)]
    counters = [np.zeros(1) for _ in rows]
    counters[1] = counters[0]  # so that counting takes launches of its own
    numbers = Capturable([None] * count, counters) if on_the_device else None
    launches(library)
    assert launch(library, rows, capturable=numbers, **OPTIONS) is None
    total = len(launches(library))
    assert total >= (10 if on_the_device else 5)
    for number in range(1, total + 1):
        monkeypatch.setenv("CUDA_HOST_FAIL", str(number))
        error = launch(library, rows, capturable=numbers, **OPTIONS)
        assert error and "no kernel image" in error
        assert len(launches(library)) == number - 1


def test_scalars_per_row(library):
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 40, (F64 if i % 5 == 0 else F32,) * 4) for i in range(900)]
    lr, decay = (list(rng.uniform(0.001, 0.1, len(rows))) for _ in range(2))
    check(library, rows, lr=lr, weight_decay=decay, step=[1 + i % 100 for i in range(len(rows))])


def test_rates_of_each_and_few_steps(library):
    """Rows carry their rates then; what few of them differ in does not travel with each."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 40, (F32,) * 4) for _ in range(60)]
    check(
        library, rows, lr=list(rng.uniform(0.001, 0.1, 60)), step=[3 + i // 20 for i in range(60)]
    )


def test_mixed_list(library, seed):
    """Formats, layouts and rows with and without maxima in any order."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in rng.permutation(len(COMBINATIONS)):
        row = make_row(rng, (9, int(rng.integers(1, 70))), COMBINATIONS[index], rng.random() < 0.5)
        rows.append([x.T for x in row] if rng.random() < 0.2 else row)
    check(library, rows, step=4)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.999])
def test_extreme_values(library, beta1):
    """Infinities, NaN, subnormals and zeros go where the CPU backend sends them."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, 1e-300, 3e38, 65504, 1e300, 1.0]
    grid = np.array(list(itertools.product(special, repeat=3))).T
    rows = []
    with np.errstate(all="ignore"):
        for dtypes in COMBINATIONS:
            p, g, m = (placed(x, t) for x, t in zip(grid, dtypes[:3], strict=True))
            rows.append([p, g, m, placed(abs(grid[2]), dtypes[3]), placed(abs(grid[0]), dtypes[3])])
    check(library, rows, betas=(beta1, 0.99), weight_decay=0.5)


def capturable_case(rng, count, shared=True):
    """Rows with numbers on the device, some of them shared, and what those numbers are."""
    rows = [make_row(rng, 20, COMBINATIONS[int(rng.integers(8))]) for _ in range(count)]
    lr = [np.array([x], F32) for x in rng.uniform(0.001, 0.1, count)]
    for i in range(0, count, 3):
        lr[i] = None
    taken = rng.integers(0, 1000, count)
    step = [np.array([n], COUNTERS[i % 4]) for i, n in enumerate(taken)]
    for i in range(4, count, 5) if shared else ():
        step[i] = step[i - 2]
    numbers = {
        "lr": [OPTIONS["lr"] if x is None else float(x[0]) for x in lr],
        "step": [int(x[0]) + 1 for x in step],
    }
    return rows, Capturable(lr, step), numbers


@pytest.mark.parametrize("count", [1, 50, 2500])  # the last: more than one batch of counters
def test_capturable(library, count, monkeypatch):
    seed = count % 4
    monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
    rows, capturable, numbers = capturable_case(np.random.default_rng(seed), count)
    capturable.grad_scale = np.array([8.0], F32)
    capturable.found_inf = np.array([0.0], F32)
    options = {**OPTIONS, "lr": numbers["lr"]}
    check(library, rows, capturable, grad_scale=8.0, step=numbers["step"], **options)
    assert [int(x[0]) for x in capturable.step] == numbers["step"]


@pytest.mark.parametrize("shared", [False, True])
def test_found_inf_leaves_everything_alone(library, seed, shared):
    rows, capturable, numbers = capturable_case(np.random.default_rng(seed), 30, shared)
    capturable.found_inf = np.array([1.0], F32)
    want = [[copy_of(x) for x in roles] for roles in rows]
    assert launch(library, rows, capturable=capturable, **OPTIONS) is None
    compare(rows, want)
    assert [int(x[0]) + 1 for x in capturable.step] == numbers["step"]


def test_nothing_to_do(library):
    launches(library)
    assert launch(library, [], **OPTIONS) is None
    assert launch(library, [[np.zeros(0, F32)] * 4], **OPTIONS) is None
    assert launches(library) == []


def test_elements_across_their_own_boundaries_are_refused(library):
    odd = np.zeros(9, np.uint8)[1:].view(F32)
    rows = [[np.ones(2, F32) for _ in range(4)], [np.ones(2, F32), odd, *np.ones((2, 2), F32)]]
    assert re.search("not a multiple", launch(library, rows, **OPTIONS))
    assert (rows[0][0] == 1).all()
    capturable = Capturable([None] * 2, [np.zeros(1)] * 2)
    assert re.search("not a multiple", launch(library, rows, capturable=capturable, **OPTIONS))
    assert capturable.step[0] == 0


@pytest.mark.skipif(SANITIZE is not None, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    left_out = ("asan", "heads", "nothing", "many_tensors", "refused", "32_bits", "fails", "more")
    chosen = " and ".join(f"not {name}" for name in left_out)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
