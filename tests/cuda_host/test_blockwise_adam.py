"""Blockwise Adam's CUDA kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import itertools
import math
import mmap

import numpy as np
import pytest

import fusedopt
from cuda_host.adam_arrays import (
    BF16,
    F32,
    F64,
    FLOATS,
    OPTIONS,
    SEEDS,
    compare,
    copy_of,
)
from cuda_host.blockwise_arrays import (
    ASAN,
    COMBINATIONS,
    again_under_asan_and_ubsan,
    check,
    launch,
    load,
    make_row,
)
from fusedopt import _C
from fusedopt.partitions import Contiguous, Each, Heads, Transposed, block_ids

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
LAYOUTS = {
    "transposed": lambda x: x.T,
    "gaps": lambda x: x[..., ::2],
    "backward": lambda x: x[::-1],
    "permuted": lambda x: x.reshape(*x.shape[:-1], -1, 2).swapaxes(0, -1),
}

pytestmark = [
    pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"),
    pytest.mark.usefixtures("with_fma"),
]


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


def listed(case):
    """The partition and the shapes of one list."""
    return (case[0], [case[1]]) if isinstance(case, tuple) else (case, SHAPES)


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


@pytest.mark.skipif(ASAN, reason="this is the sanitised run")
def test_again_under_asan_and_ubsan():
    again_under_asan_and_ubsan(__file__, ("32_bits",))
