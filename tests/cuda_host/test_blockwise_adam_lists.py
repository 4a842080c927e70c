"""Blockwise Adam's CUDA launches on the CPU: lists, numbers on the device, order, limits."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cuda_host import build as shim
from cuda_host.adam_arrays import (
    BF16,
    COUNTERS,
    F16,
    F32,
    F64,
    OPTIONS,
    SEEDS,
    compare,
    copy_of,
    launches,
)
from cuda_host.blockwise_arrays import (
    ASAN,
    SOURCES,
    Capturable,
    again_under_asan_and_ubsan,
    check,
    launch,
    load,
    make_row,
    mixed,
)
from fusedopt import _C
from fusedopt.partitions import Contiguous

pytestmark = [
    pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"),
    pytest.mark.usefixtures("with_fma"),
]


@pytest.fixture(scope="module")
def library():
    return load("address" if ASAN else None)


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
    names = shim.kernels_declared(shim.CSRC.glob("cuda/blockwise_adam/*.cuh"))
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
    again_under_asan_and_ubsan(__file__, ("races", "order", "nothing", "few_launches", "refused"))
