"""Newton–Schulz's CUDA kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from cuda_host import build as shim
from cuda_host.adam_arrays import CODES, SEEDS, launches, placed
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt import reference
from newton_schulz_cases import NUMPY, error, gauss, plain_error, ulp

# A process has ASan from its start or not at all: this file runs itself once more under it.
ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
KERNELS = sorted(shim.CSRC.glob("cuda/newton_schulz/*.cu"))
SOURCES = [*KERNELS, shim.HERE / "newton_schulz_entry.cu"]
METHODS = ["standard", "gram"]
HALF = ["bfloat16", "float16"]
# Every edge of the tiles of 64 and 128, of 8 elements in a row, and of the depth's steps.
SHAPES = [(9, 9), (15, 150), (63, 64), (66, 65), (128, 129)]
GRAM = [((66, 65), "gram"), ((33, 140), "gram")]


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
        ("arithmetic", ctypes.c_uint8),
    ]


def load(sanitize):
    loaded = shim.load(shim.build(SOURCES, sanitize=sanitize))
    loaded.newton_schulz.restype = ctypes.c_char_p
    loaded.newton_schulz_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


def launch(library, pairs, method="standard", dtype="float32", steps=5, workspace=None, **options):
    """One call on (input, output) pairs; None, or what went wrong."""
    if method == "gram" and dtype in HALF:
        options.setdefault("restarts", (1, 3))
    schedule = schedules.make("jordan", steps, method, dtype, dtype, **options)
    matrices = (Matrix * len(pairs))(*(Matrix.of(g, out) for g, out in pairs))
    list_of_steps = (Step * len(schedule.steps))(*(Step(*step) for step in schedule.steps))
    call = Call(
        ctypes.addressof(matrices),
        len(pairs),
        ctypes.addressof(list_of_steps),
        len(list_of_steps),
        schedule.gram_from,
        CODES[NUMPY[schedule.dtype]],
        CODES[NUMPY[schedule.arithmetic]],
    )
    if workspace is None:
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


def bound_of(g, want, method, dtype):
    """Of jordan's five steps; the Gram form's is the issue's in half precision, else its own."""
    if dtype == "float64":
        return 1e-11
    own = method == "gram" and dtype not in HALF
    plain = plain_error(g.astype(np.float64), "jordan", want, dtype=dtype, gram=own)
    return 2 * (1 + (method == "gram" and dtype == "bfloat16")) * plain + 2 * ulp(dtype)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("shape", "method"), [*((s, "standard") for s in SHAPES), *GRAM], ids=str)
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
    assert error(results[0].astype(np.float64), want) <= bound_of(g, want, method, dtype)


def test_the_half_precision_gram_form_where_rounding_is_coherent(library):
    """What "auto" takes in float16; one shape of all-ones matrices may be lucky: by the worst."""
    ours, plain = [], []
    for shape in [(9, 40), (17, 900), (20, 60), (33, 140), (40, 90), (64, 130), (64, 256)]:
        g = placed(np.ones(shape), NUMPY["float16"])
        want = reference.newton_schulz(g.astype(np.float64))
        ours.append(error(run(library, [g], method="auto", dtype="float16")[0], want))
        plain.append(plain_error(g.astype(np.float64), "jordan", want, dtype="float16"))
    assert max(ours) <= 3 * max(plain) + ulp("float16")


def test_bands_of_tiles(library):
    """More rows of tiles than are walked together, and a last band that is not full."""
    g = placed(gauss(650, 700), NUMPY["float32"])
    want = reference.newton_schulz(g.astype(np.float64), steps=1)
    assert error(run(library, [g], steps=1)[0].astype(np.float64), want) <= 1e-5


def test_order_of_threads_changes_no_bit(library, monkeypatch):
    for dtype in NUMPY:
        g, results = placed(gauss(33, 70), NUMPY[dtype]), set()
        for seed in SEEDS:
            monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
            results.add(run(library, [g], dtype=dtype)[0].tobytes())
        assert len(results) == 1


def pieces(dtype):
    """Matrices of several shapes, turned, strided and not aligned."""
    base = placed(gauss(40, 90), dtype, offset=1)
    return [base, base.T, base[:30, ::3], base[::2, 5:6], base[:, :40][::-1], base[:12, :12].T]


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_list_gives_what_each_gives_alone(library, dtype):
    inputs = pieces(NUMPY[dtype])
    together = run(library, [*inputs, *inputs[:2]], dtype=dtype)
    alone = [run(library, [g], dtype=dtype)[0] for g in inputs]
    for got, want in zip(together, [*alone, *alone[:2]], strict=True):
        assert got.tobytes() == want.tobytes()
    assert together[1].tobytes() == together[0].T.tobytes()


@pytest.mark.parametrize("out", NUMPY)
@pytest.mark.parametrize("given", NUMPY)
def test_dtypes_in_and_out_are_free(library, given, out):
    """Whatever products read and write; in place, and by strides on both sides."""
    g = placed(gauss(20, 33), NUMPY[given])
    want = reference.newton_schulz(g.astype(np.float64), dtype="float16")
    got = placed(np.zeros((33, 20)), NUMPY[out]).T
    assert launch(library, [(g, got)], dtype="float16") is None
    assert error(got.astype(np.float64), want) <= 0.01 + ulp(out)
    if given == out:
        assert launch(library, [(g, g)], dtype="float16") is None
        assert np.array_equal(g, got)


def test_float32_arithmetic_of_rounded_input(library):
    """What "gram" takes in half precision where its own is not good enough."""
    g = placed(gauss(20, 60), NUMPY["float32"])
    out = placed(np.zeros(g.shape), g.dtype)
    for dtype in HALF:
        launches(library)
        assert launch(library, [(g, out)], dtype=dtype, method="gram", restarts=None) is None
        launched = library.cuda_host_take_launches().decode()
        assert ("fma_product" in launched) == (dtype == "bfloat16")
        assert ("tensor_product" in launched) == (dtype == "float16")
        want = reference.newton_schulz(g, dtype=dtype)
        assert error(out.astype(np.float64), want) <= (1e-4 if dtype == "bfloat16" else 0.01)


def test_matrices_of_a_shape_share_their_launches(library):
    """513 are two batches; another shape is one more."""
    inputs = [placed(gauss(2, 3, seed=i), NUMPY["float32"]) for i in range(513)]
    launches(library)
    results = run(library, [*inputs, placed(gauss(9, 12), NUMPY["float32"])])
    assert len(launches(library)) == 3 * (4 + 3 * 5)
    for i in (0, 511, 512):
        assert error(results[i], reference.newton_schulz(inputs[i])) <= 1e-6


def test_nothing_to_do_launches_nothing(library):
    launches(library)
    run(library, [np.zeros((0, 3), np.float32), np.zeros((4, 0), np.float32)])
    assert launches(library) == []


def test_a_failed_launch_is_told(library, monkeypatch):
    g = placed(gauss(9, 12), NUMPY["bfloat16"])
    for attempt in range(1, 1 + 4 + 3 * 5):
        launches(library)
        monkeypatch.setenv("CUDA_HOST_FAIL", str(attempt))
        message = launch(library, [(g, np.zeros_like(g))], dtype="bfloat16")
        assert message and b"no kernel image" in message
        assert len(launches(library)) == attempt - 1


def test_addresses_beyond_32_bits(library):
    """Rows further apart than 2^31 elements, of memory that is never touched between them."""
    stride = 2**31 + 3
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    far = np.frombuffer(mmap.mmap(-1, 4 * (stride + 20), flags=flags), np.float32)
    g = np.lib.stride_tricks.as_strided(far, (2, 20), (4 * stride, 4))
    g[...] = gauss(2, 20)
    got, want = run(library, [g, placed(g, g.dtype)])
    assert got.tobytes() == want.tobytes()


def test_too_long_a_side_is_refused(library):
    launches(library)
    small, long = (
        np.ones((2, 3)),
        np.lib.stride_tricks.as_strided(np.ones(1), (1, 2**30 + 1), (0, 0)),
    )
    message = launch(library, [(small, small), (long, long)], workspace=np.empty(0))
    assert b"side of more than 2^30" in message
    assert launches(library) == []


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


def test_no_races(monkeypatch):
    """No two threads touch the same byte without an order between them."""
    library = load("race")
    for seed, multiprocessors in zip(SEEDS[:2], (1, 1000), strict=True):
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        monkeypatch.setenv("CUDA_HOST_SMS", str(multiprocessors))
        for dtype in NUMPY:
            method = METHODS[multiprocessors == 1]
            run(library, [placed(gauss(9, 20), NUMPY[dtype])], method=method, dtype=dtype)
    for dtype in ("float32", "bfloat16"):  # a tile beside the diagonal, two steps along the depth
        run(library, [placed(gauss(66, 67), NUMPY[dtype])], dtype=dtype, steps=1)


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    left_out = (
        "asan",
        "races",
        "bands",
        "coherent",
        "order",
        "32_bits",
        "failed",
        "share",
        "129",
        "gram-float64",
    )
    chosen = " and ".join(f"not {name}" for name in left_out)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**shim.sanitizer_env(), "PYTHONMALLOC": "malloc"}
    done = subprocess.run(
        [*command, "-k", chosen, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
