"""The shim's own tests: right kernels give right results, and planted bugs are found."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cuda_host import build as shim

KERNELS = sorted((shim.HERE / "kernels").glob("*.cu"))
# A process has ASan from its start or not at all: this file runs itself once more under it.
BUILDS = ["address"] if "libasan" in os.environ.get("LD_PRELOAD", "") else [None, "race"]
SEEDS = [0, 1, 2]  # threads in ascending, descending and random order
INVALID_VALUE, INVALID_CONFIGURATION, TOO_MANY_BLOCKS = 1, 9, 720  # of cudaError_t
RNG = np.random.default_rng(0)


@pytest.fixture(scope="session")
def libraries():
    return {kind: shim.load(shim.build(KERNELS, sanitize=kind)) for kind in BUILDS}


@pytest.fixture(params=BUILDS, ids=str)
def library(request, libraries):
    return libraries[request.param]


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_SEED", str(request.param))


def call(library, function, *arguments):
    """Calls a launcher, with arrays by address. Returns its cudaError_t."""
    by_address = (
        ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments
    )
    return getattr(library, function)(*by_address)


def message(library, status):
    return library.cudaGetErrorString(status).decode()


# ---- the launchers of kernels/*.cu: each returns its status and whether the result is right


def sum_of_squares(library, n):
    x, total = RNG.standard_normal(n, np.float32), np.full(1, np.nan, np.float32)
    status = call(library, "sum_of_squares", x, ctypes.c_int64(n), total, 3, None)
    return status, np.isclose(total[0], (x.astype(np.float64) ** 2).sum(), rtol=1e-6)


def round_to_bf16(library):
    bits = RNG.integers(0, 2**32, 5000, np.uint32)
    ties = bits[:1000] & 0xFFFF0000 | 0x8000
    x = np.concatenate([bits, ties, np.uint32([0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000])])
    x = x[~np.isnan(x.view(np.float32))]
    y = np.zeros(x.size, np.uint16)
    status = call(library, "round_to_bf16", x, y, ctypes.c_int64(x.size), None)
    return status, (y == (x + np.uint64(0x7FFF) + (x >> 16 & 1)) >> 16).all()


def gemm(library, m, n, k, bfloat16):
    def operand(rows, columns):
        x = RNG.standard_normal((rows, columns), np.float32)
        x[0] *= 1e-6  # subnormal in fp16
        if not bfloat16:
            return x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float64)
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    (a, a_value), (b, b_value) = operand(m, k), operand(k, n)
    c = np.full((m, n), np.nan, np.float32)
    status = call(library, "gemm", a, b, c, m, n, k, int(bfloat16), None)
    # k / 16 sums, each of which drops less than a unit in fp32's last place
    bound = (k / 16 + 1) * 2.0**-23 * (abs(a_value) @ abs(b_value))
    return status, (abs(c - a_value @ b_value) <= bound).all()


def reverse(library, bug=0):
    x = RNG.integers(0, 2**32, (17, 64, 4), np.uint32)
    y = np.zeros_like(x)
    return call(library, "reverse", x, y, 17, 3, bug, None), (y == x[:, ::-1]).all()


def smooth(library, mode=0, blocks=5, rounds=4):
    x = RNG.standard_normal(1000, np.float32)
    y, want = np.zeros_like(x), x.copy()
    for _ in range(rounds):
        last = want
        want = np.float32(0.25) * (np.roll(last, 1) + np.roll(last, -1)) + np.float32(0.5) * last
    change, barrier = np.full(blocks, np.nan, np.float32), np.zeros(1, np.uint32)
    status = call(library, "smooth", x, y, change, 1000, rounds, blocks, mode, barrier, None)
    return status, (x == want).all() and np.isclose(change.sum(), abs(want - last).sum(), 1e-5)


def relay(library, function, bug=0):
    x = RNG.integers(0, 100, 6 * 64, np.int32)
    want = np.cumsum(x) if function == "relay" else x.sum(keepdims=True)
    y, parts, flags = np.zeros(want.size, np.int32), np.zeros(6, np.int32), np.zeros(6, np.uint32)
    return call(library, function, x, y, parts, flags, 6, bug, None), (y == want).all()


def fill(library, smem_bytes=512, opt_in=False, sizes=(3, 0, 1000)):
    tensors = [np.zeros(n, np.float32) for n in sizes]
    data, numel = np.array([t.ctypes.data for t in tensors]), np.array(sizes)
    options = (len(sizes), ctypes.c_float(2), smem_bytes, int(opt_in), None)
    return call(library, "fill", data, numel, *options), all((t == 2).all() for t in tensors)


RIGHT = (0, True)


class TestRightKernels:
    @pytest.mark.parametrize("n", [0, 1, 3, 31, 257, 4096, 20011])
    def test_block_reduction(self, library, seed, n):
        assert sum_of_squares(library, n) == RIGHT

    def test_rounding(self, library):
        assert round_to_bf16(library) == RIGHT

    @pytest.mark.parametrize("shape", [(16, 8, 8), (33, 40, 56), (64, 48, 128)], ids=str)
    @pytest.mark.parametrize("bfloat16", [False, True], ids=["fp16", "bf16"])
    def test_tensor_cores(self, library, seed, shape, bfloat16):
        assert gemm(library, *shape, bfloat16) == RIGHT

    def test_warp_operations(self, library, seed):
        t, out = np.arange(40), np.zeros((12, 40), np.int32)
        lane, warp, last = t % 32, t // 32 * 32, np.where(t < 32, 31, 39)

        def if_in_segment(source, width):
            return np.where((source // width == t // width) & (source <= last), source, t)

        halves = np.where(lane < 16, t // 8 * 64 + 28, 2 * t + 1 - 2 * (t % 2))
        want = [
            warp + 3,
            t // 4 * 4 + (lane + 1) % 4,
            if_in_segment(t - 2, 32),
            if_in_segment(t - 1, 8),
            if_in_segment(t + 3, 8),
            t ^ 5,
            t ^ 1,
            np.where(t < 32, np.uint32(0xAAAAAAAA).view(np.int32), 0xAA),
            t * 0 + 1,
            t < 32,
            halves,
            halves[warp],
        ]
        assert call(library, "warp_operations", out, None) == 0
        np.testing.assert_array_equal(out, want)

    def test_block_operations_and_atomics(self, library, seed):
        t, out, atomics = np.arange(40), np.zeros((3, 40), np.int32), np.zeros(9, np.int32)
        atomics[4] = -1
        assert call(library, "block_operations", out, atomics, None) == 0
        np.testing.assert_array_equal(out, np.repeat([[14], [1], [0]], 40, axis=1))
        bits = [0, 0xFF, np.bitwise_xor.reduce(t)]
        np.testing.assert_array_equal(atomics, [780, -780, -39, 39, *bits, 40 % 7, 80])

    def test_asynchronous_pipeline(self, library, seed):
        assert reverse(library) == RIGHT

    def test_grid_barrier(self, library, seed):
        assert smooth(library) == RIGHT

    @pytest.mark.parametrize("function", ["relay", "last_block"])
    def test_release_and_acquire(self, library, seed, function):
        assert relay(library, function) == RIGHT

    def test_large_table_by_value(self, library):
        assert fill(library) == RIGHT

    def test_launches_from_several_threads(self, library):
        with ThreadPoolExecutor(2) as pool:  # neither is the thread that has launched so far
            results = list(pool.map(lambda run: run(library), [smooth, reverse] * 2))
        assert results == [RIGHT] * 4


def test_right_kernels_under_address_sanitizer():
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::TestRightKernels"]
    shim.build(KERNELS, sanitize="address")  # here, where the compiler runs without ASan
    done = subprocess.run(command, env=shim.sanitizer_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- planted bugs

WRONG = "a wrong value"
N = np.arange(64)
PLANTED = {  # a kernel of planted.cu: what it would write if it were right, and who finds it how
    "missing_syncthreads": (63 - N, {None: WRONG, "race": "data race"}),
    "missing_syncwarp": (N ^ 1, {None: WRONG, "race": "data race"}),
    "same_value_race": (N * 0 + 1, {"race": "data race: write at .*/planted.cu:"}),
    "unwritten_shared": (N, {None: WRONG}),
    "block_reads_block": (
        np.concatenate([N[:8], np.roll(N[:8], -1), N[16:] * 0]),
        {None: WRONG, "race": "data race"},
    ),
    "divergent_barrier": (None, {None: r"divergent __syncthreads\(\) at .*/planted.cu:"}),
    "two_barriers": (None, {None: r"divergent __syncthreads\(\).*/planted.cu:.*/planted.cu:"}),
    "absent_lane": (None, {None: "reads lane 3, which did not take part"}),
    "half_a_warp": (None, {None: r"deadlock(.|\n)*32 threads .* wait in __shfl_xor_sync"}),
    "misaligned_load": (None, {None: "misaligned access"}),
    "misaligned_dereference": (None, {"address": "planted.cu.*misaligned address"}),
    "shared_overflow": (None, {"address": r"use-after-poison(.*\n){2}.*shared_overflow_kernel"}),
    "dynamic_shared_overflow": (None, {"address": r"heap-buffer-overflow(.*\n){2}.*dynamic_"}),
    "out_of_bounds_tail": (None, {"address": r"heap-buffer-overflow(.*\n){2}.*tail_kernel"}),
}
# A buffer of malloc's own, which has redzones under ASan; Python's and NumPy's may not.
CALL_PLANTED = """
import ctypes, sys
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(ctypes.c_void_p(malloc(256)), None)
"""


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, kinds) in PLANTED.items() for kind in kinds]
)
def test_planted_bug_is_found(libraries, monkeypatch, name, kind):
    want, kinds = PLANTED[name]
    if kind == "address":
        path = shim.build(KERNELS, sanitize="address")
        command = [sys.executable, "-c", CALL_PLANTED, str(path), name]
        done = subprocess.run(command, env=shim.sanitizer_env(), capture_output=True, text=True)
        assert done.returncode != 0 and re.search(kinds[kind], done.stderr), done.stderr
        return
    wrong = []
    for seed in SEEDS:
        monkeypatch.setenv("CUDA_HOST_SEED", str(seed))
        out = np.zeros(64, np.float32)
        status = call(libraries[kind], name, out, None)
        if kinds[kind] == WRONG:
            assert status == 0
            wrong.append((out != want).any())
        else:
            assert re.search(kinds[kind], message(libraries[kind], status))
    assert kinds[kind] != WRONG or any(wrong)


@pytest.mark.parametrize("bug", [1, 2, 3], ids=["no_wait", "no_barrier", "ring_too_short"])
def test_wrong_pipeline_is_found(libraries, seed, bug):
    assert reverse(libraries[None], bug) == (0, False)
    if bug > 1:  # a missing wait is no race between threads
        assert "data race" in message(libraries["race"], reverse(libraries["race"], bug)[0])


def test_forgotten_copy_is_found(library):
    status = call(library, "forgotten_copy", np.zeros(4, np.uint32), None)
    assert "without waiting for its cp.async" in message(library, status)


def test_missing_grid_barrier_is_found(libraries, seed):
    assert smooth(libraries[None], mode=1) == (0, False)
    assert "data race" in message(libraries["race"], smooth(libraries["race"], mode=1)[0])


def test_grid_barrier_in_a_plain_launch_is_found(library, seed):
    status, _ = smooth(library, mode=2)
    assert re.search(r"deadlock.*not cooperative(.|\n)*wait in a spin", message(library, status))
    assert smooth(library) == RIGHT  # and the next launch works


@pytest.mark.parametrize("function", ["relay", "last_block"])
def test_missing_release_is_found(libraries, function):
    """No schedule shows it on one processor: only the race detector can tell."""
    status, _ = relay(libraries["race"], function, bug=1)
    assert "data race" in message(libraries["race"], status)


# ---- the fake device


def test_launches_that_a_driver_refuses(library, monkeypatch):
    assert fill(library, smem_bytes=60000) == (INVALID_VALUE, False)
    assert fill(library, smem_bytes=60000, opt_in=True) == RIGHT
    assert fill(library, smem_bytes=300000, opt_in=True) == (INVALID_VALUE, False)
    assert fill(library, sizes=()) == (INVALID_CONFIGURATION, True)  # an empty grid
    assert smooth(library, blocks=8) == RIGHT
    monkeypatch.setenv("CUDA_HOST_SMS", "1")
    assert smooth(library, blocks=22)[0] == TOO_MANY_BLOCKS
    monkeypatch.setenv("CUDA_HOST_ARCH", "80")
    assert fill(library, smem_bytes=200000, opt_in=True) == (INVALID_VALUE, False)


def test_resident_blocks(library, monkeypatch):
    assert library.resident_blocks(1024, 0) == 4 * 2
    assert library.resident_blocks(128, 100 << 10) == 4 * 2
    monkeypatch.setenv("CUDA_HOST_SMS", "132")
    monkeypatch.setenv("CUDA_HOST_ARCH", "120")
    assert library.resident_blocks(1024, 0) == 132


def test_launches_are_noted(library):
    library.cuda_host_take_launches()
    x = np.zeros(300, np.float32)
    call(library, "round_to_bf16", x, x, ctypes.c_int64(300), ctypes.c_void_p(0x1234))
    smooth(library, blocks=3)
    rounded, smoothed = library.cuda_host_take_launches().decode().splitlines()
    assert "round_kernel(" in rounded and rounded.endswith(f"\t3,1,1\t128,1,1\t0\t{0x1234}\t\t0")
    assert "smooth_kernel<true>(" in smoothed and smoothed.endswith("\tcooperative\t0")
    assert library.cuda_host_take_launches() == b""


def test_every_kernel_can_be_accounted_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_KERNEL_LOG", str(tmp_path / "log"))
    sources = [path for path in KERNELS if path.stem in ("round", "smooth")]
    names = shim.kernels_declared(sources)
    assert names == {"round_kernel", "smooth_kernel"}
    path = shim.build(sources)
    library, instances = shim.load(path), shim.kernels_instantiated(path, names)
    assert library.cuda_host_kernels() == b"" and len(instances) == 3
    round_to_bf16(library)
    smooth(library, mode=0)
    assert len(instances - set(library.cuda_host_kernels().decode().splitlines())) == 1
    smooth(library, mode=1)
    assert instances == set(library.cuda_host_kernels().decode().splitlines())
    assert instances == set((tmp_path / "log").read_text().splitlines())
    sanitized = shim.load(shim.build(sources, sanitize="race"))
    round_to_bf16(sanitized)
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("\trace")


def test_all_kernels_of_this_folder_are_found_by_name():
    names = shim.kernels_declared(KERNELS)
    assert len(names) == sum(path.read_text().count("__global__") for path in KERNELS)
    assert "sum_of_squares_kernel" in names  # behind __launch_bounds__


# ---- the build


def test_a_build_is_reused_until_a_header_changes(tmp_path):
    header, source = tmp_path / "number.h", tmp_path / "a.cu"
    source.write_text('#include "number.h"\nextern "C" int number() { return kNumber; }\n')
    built = []
    for number in (1, 1, 2):
        header.write_text(f"constexpr int kNumber = {number};\n")
        built.append(shim.build([source], include=[tmp_path]))
        assert ctypes.CDLL(str(built[-1])).number() == number
    assert built[0] == built[1] != built[2]


def test_host_thread_locals_are_left_alone(tmp_path):
    """pybind11 keeps a function-local thread_local. Filled with NaN bytes as if it were
    __shared__, it aborted the process: only those of .cu files are shared memory."""
    (tmp_path / "a.cpp").write_text(
        'extern "C" int calls() { static thread_local int calls = 0; return ++calls; }\n'
    )
    library = shim.load(shim.build([tmp_path / "a.cpp", shim.HERE / "kernels/reduce.cu"]))
    assert library.calls() == 1
    assert sum_of_squares(library, 100) == RIGHT
    assert library.calls() == 2


def test_a_compiler_error_is_told(tmp_path):
    (tmp_path / "a.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(RuntimeError, match="undeclared"):
        shim.build([tmp_path / "a.cu"])


def test_nvcc_takes_the_same_sources(tmp_path):
    """Between them they use all of launch.cuh and ptx.cuh."""
    together = tmp_path / "kernels.cu"
    together.write_text("".join(f'#include "{path}"\n' for path in KERNELS))
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 86, 89, 90, 100, 120)]
    command = [
        shim.tool("nvcc"),
        "-std=c++17",
        "--fmad=false",
        f"-I{shim.CSRC}",
        *archs,
        "--threads=2",
    ]
    command += ["-c", str(together), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
