"""Blockwise Adam on backend triton against float64 and, for coordinates, against Triton's AdamW.

With TRITON_INTERPRET=1 (a process of its own, see run.py) the kernels run in Triton's interpreter,
on CPU tensors and on stand-ins for GPU tensors whose memory is the CPU's; without it, on a GPU.
"""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from test_blockwise_adam import (
    ANY,
    FLOATS,
    LAYOUTS,
    OPTIONS,
    OWN,
    SHAPES,
    cases,
    check_steps,
    gradients,
    laid_out,
    problem,
    states_of,
)
from test_triton_adamw import DEVICE, INTERPRETED, bits, on_cpu, on_gpu

import fusedopt
from fusedopt import _C, partitions
from fusedopt.partitions import Contiguous, Heads, Transposed

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # in the interpreter's NumPy
]
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="compares CPU tensors")

SPLIT = [(slice(0, 2), "coordinate"), (slice(2, 6), "column")]


def step(backend, arrays, grads, kind, **options):
    p, m, v = arrays
    options = {**OPTIONS, "partitions": kind, **options}
    fusedopt.blockwise_adam_step(p, grads, m, v, backend=backend, **options)


def problems(kinds, shapes, dtypes):
    """One tensor of each, as lists of a role."""
    parts = [problem(k, [s], d) for k, s, d in zip(kinds, shapes, dtypes, strict=True)]
    return [[x for [x] in role] for role in zip(*parts, strict=True)]


def copies(arrays):
    return [[x.clone() for x in role] for role in arrays]


def moved(arrays):
    return [[x.to(DEVICE) for x in role] for role in arrays]


def assert_close(got, want):
    """To the CPU's: sums have another order there, and it may fuse nothing."""
    for role, other in zip(got, want, strict=True):
        for x, y in zip(role, other, strict=True):
            eps = torch.finfo(y.dtype).eps
            torch.testing.assert_close(x.cpu(), y, rtol=4 * eps, atol=4 * eps, equal_nan=True)


def assert_same_bits(got, want):
    for role, other in zip(got, want, strict=True):
        for x, y in zip(role, other, strict=True):
            assert torch.equal(bits(x).reshape(-1), bits(y).reshape(-1))


# ---- values


@interpreted_only
@pytest.mark.parametrize("kind", ANY + OWN, ids=repr)
def test_steps_against_float64(kind):
    """Every partition, gradients over 12 decades: the bound of every backend."""
    kind, shapes = cases(kind)
    steps = 1 if sum(map(math.prod, shapes)) > 50_000 else 2
    check_steps(kind, shapes, (torch.float32,) * 3, "triton", steps)


@interpreted_only
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["row", Contiguous(8), "column", "global"], ids=repr)
def test_dtypes_against_float64(dtype, kind):
    """States of both kinds, gradients of another dtype."""
    for state in states_of(dtype)[::2]:
        check_steps(
            kind, SHAPES[3:], (dtype, FLOATS[state == dtype], state), "triton", steps=2,
            maximize=True, decades=6,
        )  # fmt: skip


EVEN = [(40, 136), (9, 264)]


@interpreted_only
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("row", s) for s in [(3, 8192), (2, 8200), (5, 4096), *EVEN]]
    + [(kind, s) for kind in ("column", Transposed(Heads(n=8))) for s in EVEN],
    ids=repr,
)
def test_vectors_and_the_longest_rows_of_one_pass(kind, shape):
    """Sizes of which 16-byte accesses are made, on both sides of the limit."""
    for dtype in (torch.float32, torch.float64):
        check_steps(kind, [shape], (dtype,) * 3, "triton", steps=1)


@pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU backend has no fma here")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_coordinate_is_adamw_bit_for_bit(dtype):
    """Flat, and by strides."""
    shapes = [s for s in SHAPES if 0 not in s]
    want = moved(problem("coordinate", shapes, (dtype,) * 3))
    seconds = [x.view(s) for x, s in zip(want[2], shapes, strict=True)]
    got, apart = copies(want), copies(want)
    apart[:2] = ([spaced(x) for x in role] for role in apart[:2])
    grads = [g.to(DEVICE) for g in gradients(shapes, dtype, 1)]
    options = {**OPTIONS, "step": 2, "grad_scale": 3.0, "maximize": True}
    fusedopt.adamw_step(want[0], grads, want[1], seconds, backend="triton", **options)
    for arrays in (got, apart):
        step("triton", arrays, grads, "coordinate", **options)
        assert_same_bits(arrays, want)


def spaced(x):
    """The same values with a gap after each."""
    return torch.stack([x, x], -1)[..., 0]


def test_one_list_of_everything():
    """Several dtypes, partitions, rates and decays in one call are each tensor's own step."""
    kinds = ["row", "column", "tensor", Contiguous(7), "coordinate", Transposed("row")] * 2
    shapes = [(12, 40), (40, 12), (9, 5), (50,), (33,), (24, 16)] * 2
    dtypes = [(d,) * 3 for d in (torch.float32, torch.bfloat16) for _ in range(6)]
    together = moved(problems(kinds, shapes, dtypes))
    alone = copies(together)
    grads = [gradients([s], d[1], 1)[0].to(DEVICE) for s, d in zip(shapes, dtypes, strict=True)]
    lr, decay = [0.01 * i for i in range(1, 13)], [0.1 * i for i in range(12)]
    step("triton", together, grads, kinds, step=3, lr=lr, weight_decay=decay)
    for i, kind in enumerate(kinds):
        one = [role[i : i + 1] for role in alone]
        step("triton", one, [grads[i]], kind, step=3, lr=lr[i], weight_decay=decay[i])
    assert_same_bits(together, alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["row", "column", Contiguous(9000)], ids=repr)
def test_nan_and_inf_stay_in_their_block(kind, bad):
    shape = (12, 1600)
    arrays = problem(kind, [shape], (torch.float32,) * 3)
    grads = gradients([shape], torch.float32, 1)
    grads[0][5, 7] = bad
    got = moved(copies(arrays))
    step("triton", got, [g.to(DEVICE) for g in grads], kind, step=2)
    step("cpu", arrays, grads, kind, step=2)
    for x, y in zip(got, arrays, strict=True):
        assert torch.equal(x[0].cpu().isfinite(), y[0].isfinite())
    assert_close(got, arrays)


# ---- blocks over several tensors


@pytest.mark.parametrize("missing", [(), (2,), (0,), (0, 1, 2, 3)])
def test_global_block(missing):
    """Tensors without a gradient hold its value too, and count for nothing."""
    shapes = [(5, 3), (0,), (7,), (20_000,), (2, 2)]
    want = problem("global", shapes, (torch.float32,) * 3)
    grads = gradients(shapes, torch.float32, 1, decades=2)
    grads = [None if i in missing else g for i, g in enumerate(grads)]
    if len(missing) == 4:
        grads[4] = None
    got = moved(copies(want))
    there = [None if g is None else g.to(DEVICE) for g in grads]
    step("triton", got, there, "global", step=3)
    step("cpu", want, grads, "global", step=3)
    assert_close(got, want)
    assert len({float(v) for v in got[2]}) == 1


# ---- where elements lie


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS[1:4]], ids="-".join)
@pytest.mark.parametrize("kind", ["row", "column", "global", "coordinate", SPLIT], ids=repr)
def test_layouts(kind, layouts):
    inner, outer = layouts
    shape = (6, 5, 3, 33)
    for dtype in (torch.float32, torch.bfloat16):
        want = problem(kind, [shape], (dtype,) * 3)
        grads = gradients([shape], dtype, 1, decades=2)
        got = [[laid_out(want[0][0], inner)], [laid_out(want[1][0], outer)], [want[2][0].clone()]]
        step(
            "triton",
            moved(got) if not INTERPRETED else got,
            [laid_out(grads[0], outer)],
            kind,
            step=3,
        )
        step("cpu", want, grads, kind, step=3)
        assert_close(got, want)


@pytest.mark.parametrize("kind", ["row", "column", "tensor", Contiguous(8)], ids=repr)
def test_neighbours_are_left_alone(kind):
    for shape in [(4, 8), (3, 7), (2, 9000), (130, 3)]:
        numel = shape[0] * shape[1]
        arrays = problem(kind, [shape], (torch.float32,) * 3)
        around = [torch.full((len(x[0].reshape(-1)) + 64,), 7.0, device=DEVICE) for x in arrays]
        inner = [x[32 : len(x) - 32] for x in around]
        for x, (value,) in zip(inner, arrays, strict=True):
            x.copy_(value.reshape(-1))
        roles = [[x.view(shape) if len(x) == numel else x] for x in inner[:2]]
        step("triton", [*roles, [inner[2]]], gradients([shape], torch.float32, 1), kind, step=1)
        for x in around:
            assert (x[:32] == 7).all() and (x[len(x) - 32 :] == 7).all()


# ---- numbers on the device


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_numbers_on_the_device(found_inf):
    """The step, lr, decay, loss scale and found_inf lie there, and the step is counted."""
    kinds = ["row", "column", "global", "coordinate", "tensor", "global", "global"]
    shapes = [(6, 35), (35, 6), (9, 9), (31,), (20_000,), (5,), (4,)]
    arrays = problems(kinds, shapes, [(torch.float32,) * 3] * len(kinds))
    grads = gradients(shapes, torch.float32, 1, decades=2)
    grads[5] = None
    got = [[on_gpu(x) for x in role] for role in arrays]
    before = copies(arrays)
    before[2][5] = torch.full((1,), 0.7)  # a GPU's copies of a value are not compared
    got[2][5] = on_gpu(before[2][5])
    counts = [on_gpu(torch.tensor(10.0 * i)) for i in range(len(kinds))]
    numbers = {"lr": 0.02, "weight_decay": 0.1, "grad_scale": 1024.0}
    device = {name: on_gpu(torch.tensor(x, dtype=torch.float64)) for name, x in numbers.items()}
    if found_inf is not None:
        device["found_inf"] = on_gpu(torch.tensor(found_inf))
    there = [None if g is None else on_gpu(g) for g in grads]
    stream = 0 if INTERPRETED else None
    step("triton", got, there, kinds, step=counts, maximize=True, stream=stream, **device)
    host = [torch.tensor(10.0 * i) for i in range(len(kinds))]
    step("cpu", arrays, grads, kinds, step=host, maximize=True, **numbers)
    got = [[on_cpu(x) for x in role] for role in got]
    if found_inf:
        assert_same_bits(got, before)
    else:
        assert_close(got, arrays)
    counted = [10 * i + (0 if found_inf or i == 5 else 1) for i in range(len(kinds))]
    assert [int(on_cpu(c)) for c in counts] == counted


# ---- the optimizer


@interpreted_only
def test_optimizer(monkeypatch):
    """Groups, partitions and counters as ``optim.BlockwiseAdam`` keeps them, step after step.

    On the CPU its launch goes to the CPU's kernels, so it is led to Triton's here.
    """
    from fusedopt.steps import _adam

    def through_triton(plan, operation, **_):
        launches.append(operation)
        _adam.triton_room(operation).launch(*plan.packed_on_cpu())

    launches = []
    kinds = ["row", "global", Transposed("row"), "coordinate", "global", "tensor"]
    shapes = [(6, 35), (9, 9), (35, 6), (31,), (4,), (20, 9)]
    results = []
    for triton in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        groups = [
            {"params": params[:3], "partition": dict(zip(params[:3], kinds[:3], strict=True))},
            {"params": params[3:], "lr": 0.1, "maximize": True, "weight_decay": 0.3,
             "partition": dict(zip(params[3:], kinds[3:], strict=True))},
        ]  # fmt: skip
        optimizer = fusedopt.optim.BlockwiseAdam(groups, **OPTIONS)
        with monkeypatch.context() as patch:
            if triton:
                patch.setattr(_adam, "launch", through_triton)
            for number in range(3):
                for i, p in enumerate(params):
                    p.grad = None if (i, number) == (4, 1) else torch.randn(p.shape)
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())  # a new plan's addresses
        states = [optimizer.state[p] for p in params]
        results.append(
            [[p.detach() for p in params]]
            + [[state[key] for state in states] for key in ("exp_avg", "block_sq", "step")]
        )
    assert launches == ["blockwise_adam_step"] * 3
    assert_close(*results)
    assert [int(count) for count in results[0][3]] == [3, 3, 3, 3, 2, 3]


# ---- how regions go


def test_ways_of_regions():
    """Results don't tell one pass from two, nor 16 bytes at a time from 4: the plan does."""
    from fusedopt.triton_kernels import _regions as r
    from fusedopt.triton_kernels import _table

    def way(region, layout=-1, address=256, dtype=0):
        rows = np.array([[address] * 4 + [0, 0, 10**6, layout, 0, dtype * 0x010101]])
        made = r.Regions(np.array([[0, 0, *region, 0, -1]]), rows)
        return made.way[0], made.access[0]

    vector, single, strided = (x.value for x in (_table.VECTOR, _table.SINGLE, _table.STRIDED))
    assert way((1, 1000, 1000, 1)) == (r.ELEMENTS, single)
    assert way((1, 1000, 1000, 1), layout=0) == (r.COORDINATES, strided)
    assert way((1, 81920, 81920, 8192)) == (r.ONE, vector)
    assert way((1, 81920, 81920, 8192), dtype=1) == (r.TWO, vector)
    assert way((1, 81930, 81930, 8193)) == (r.TWO, single)
    assert way((1, 40960, 40960, 4096), layout=0) == (r.ONE, strided)
    assert way((1, 800, 800, 8), address=260) == (r.ONE, single)
    assert way((64, 128, 128, 1)) == (r.TWO, vector)
    assert way((64, 128, 130, 1)) == (r.TWO, single)


def test_partitions_of_many_blocks_number_them_alike():
    """Second moments against sums by the partition's own numbering; every element differs."""
    for kind in (
        "row",
        "column",
        Transposed(Heads(n=3)),
        [(slice(0, 4), "tensor"), (slice(4, 9), "column")],
    ):
        g = torch.arange(1.0, 9 * 66 + 1).view(9, 66)
        v = torch.zeros(partitions.block_count(kind, g.shape))
        arrays = moved([[torch.zeros_like(g)], [torch.zeros_like(g)], [v]])
        step("triton", arrays, [g.to(DEVICE)], kind, step=1, betas=(0.0, 0.0))
        ids = torch.as_tensor(partitions.block_ids(kind, g.shape)).reshape(-1)
        want = torch.zeros(len(v), dtype=torch.float64)
        want.index_add_(0, ids, g.double().square().reshape(-1))
        torch.testing.assert_close(
            arrays[2][0].cpu().double(), want / torch.bincount(ids), rtol=1e-6, atol=0.0
        )
