"""Blockwise Adam on torch tensors: one differential suite for every backend and partition."""

import math

import numpy as np
import pytest
import torch

import fusedopt
import where
from fusedopt import _C, partitions, reference
from fusedopt.partitions import Contiguous, Each, Heads, Transposed

# A 0-d parameter and its second moment, of one axis, lie together on every device but a fake one.
pytestmark = pytest.mark.device_numbers
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}
BACKENDS = [None, "reference"]  # the device's own, and the truth
SHAPES = [(), (0,), (1,), (31,), (33,), (4097,), (3, 0), (12, 1), (6, 35), (48, 67), (9, 4, 3, 3)]
QKV = [(slice(0, 24), Heads(n=4)), (slice(24, 36), Heads(head_dim=3)), (slice(36, 48), "row")]

# Partitions of any shape: each runs over all of SHAPES in one list.
ANY = [
    "coordinate",
    "tensor",
    "row",
    "column",
    "global",
    Contiguous(1),
    Contiguous(2),
    Contiguous(7),
    Contiguous(31),
    Contiguous(32),
    Contiguous(100),
    Contiguous(1000),
]
# Partitions of their own shapes: among them blocks in two passes, and strips of columns.
OWN = [
    (QKV, (48, 67)),
    (QKV, (48,)),
    (Transposed(QKV), (67, 48)),
    (Transposed("row"), (67, 48)),
    (Transposed([(slice(0, 5), "column"), (slice(5, 48), "tensor")]), (67, 48)),
    (Each(Transposed("row")), (3, 20, 33)),
    (Heads(n=2), (6, 35)),
    ("tensor", (3, 30_000)),
    (Contiguous(70_001), (150_001,)),
    ("row", (2, 66_000)),
    ("column", (40_000, 2)),
    ("column", (9, 8001)),
    (Transposed(Heads(n=2)), (40, 2600)),
    (Transposed("tensor"), (40, 2600)),
    (Transposed([(slice(0, 1300), "tensor"), (slice(1300, None), "row")]), (60, 2600)),
]


def cases(kind):
    """The partition and the shapes of one list."""
    return (kind, SHAPES) if kind in ANY else (kind[0], [kind[1]])


def normal(shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def gradients(shapes, dtype, seed, decades=12):
    """Gradients over so many decades, around 1; float16 holds fewer."""
    rng = torch.Generator().manual_seed(seed)
    decades = 6 if dtype == torch.float16 else decades
    return [
        (
            normal(s, rng)
            * 10 ** (decades * torch.rand(s, generator=rng, dtype=torch.float64) - decades * 2 / 3)
        ).to(where.device, dtype)
        for s in shapes
    ]


def problem(kind, shapes, dtypes, seed=0):
    """Parameters, first and second moments; every tensor of a global block has the same one."""
    rng = torch.Generator().manual_seed(seed)
    params = [normal(s, rng).to(where.device, dtypes[0]) for s in shapes]
    moments = [normal(s, rng).mul(0.1).to(where.device, dtypes[-1]) for s in shapes]
    counts = [partitions.block_count(kind, s) for s in shapes]
    if kind == "global":
        return params, moments, [torch.full((n,), 0.3, device=where.device) for n in counts]
    return params, moments, [normal(n, rng).square().float().to(where.device) for n in counts]


def exact_copy(arrays):
    return [[x.double().cpu().numpy().copy() for x in role] for role in arrays]


def plain_step(arrays, grads, kind, step, maximize, work):
    """The formula with each operation rounded to `work`, results to the tensors' own dtypes."""
    b1, b2 = OPTIONS["betas"]
    params, moments, seconds = ([x.cpu() for x in role] for role in arrays)
    grads = [g.cpu().to(work) * (-1 if maximize else 1) for g in grads]
    ids = [torch.as_tensor(partitions.block_ids(kind, g.shape)) for g in grads]
    sums = [torch.zeros(len(v), dtype=work) for v in seconds]
    sizes = [torch.zeros(len(v), dtype=work) for v in seconds]
    for g, i, total, size in zip(grads, ids, sums, sizes, strict=True):
        total.index_add_(0, i.reshape(-1), g.square().reshape(-1))
        size.index_add_(0, i.reshape(-1), torch.ones(g.numel(), dtype=work))
    if kind == "global":
        sums, sizes = ([sum(x)] * len(x) for x in (sums, sizes))
    result = []
    for p, m, v, g, i, total, size in zip(
        params, moments, seconds, grads, ids, sums, sizes, strict=True
    ):
        second = v.to(work) * b2 + total / size * (1 - b2)
        first = m.to(work) * b1 + g * (1 - b1)
        root = second.sqrt() / (1 - b2**step) ** 0.5 + OPTIONS["eps"]
        moved = first / (root[i] if g.numel() else 1) * (OPTIONS["lr"] / (1 - b1**step))
        new = p.to(work) * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - moved
        result.append((new.to(p.dtype), first.to(m.dtype), second.to(v.dtype)))
    return [list(role) for role in zip(*result, strict=True)]


def error(got, want):
    want = torch.as_tensor(want).cpu()
    return float((got.cpu().double() - want).abs().max()) if got.numel() else 0.0


def ulp(values, dtype):
    info = torch.finfo(dtype)
    largest = float(np.abs(values).max()) if values.size else 0.0
    return max(info.eps * largest, info.smallest_normal * info.eps)


def check_steps(kind, shapes, dtypes, backend=None, steps=20, maximize=False, decades=12):
    """Steps against the float64 reference: error at most twice the plain formula's and one ulp.

    Errors of `block_sq` count relative to each block, since blocks span all decades.
    """
    ours = problem(kind, shapes, dtypes)
    rough, exact = [[x.clone() for x in role] for role in ours], exact_copy(ours)
    work = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    for step in range(3, 3 + steps):
        grads = gradients(shapes, dtypes[1], step, decades)
        p, m, v = ours
        fusedopt.blockwise_adam_step(
            p, grads, m, v, partitions=kind, step=step, maximize=maximize, backend=backend,
            **OPTIONS,
        )  # fmt: skip
        p, m, v = exact
        result = reference.blockwise_adam_step(
            p, [g.double().cpu().numpy() for g in grads], m, v,
            partitions=kind, step=step, maximize=maximize, **OPTIONS,
        )  # fmt: skip
        exact = [result.params, result.exp_avgs, result.block_sqs]
        rough = plain_step(rough, grads, kind, step, maximize, work)
    for role, name in enumerate(("params", "exp_avgs", "block_sqs")):
        for i, shape in enumerate(shapes):
            got, plain, want = ours[role][i], rough[role][i], exact[role][i]
            if kind == "global" and not got.numel():
                continue
            if name == "block_sqs" and want.size:
                scale = np.abs(want)
                got, plain = (
                    torch.as_tensor(x.double().cpu().numpy() / scale) for x in (got, plain)
                )
                want = np.ones_like(want)
                bound = 2 * error(plain, want) + ulp(want, torch.float32)
            else:
                bound = 2 * error(plain, want) + ulp(want, got.dtype)
            bound += 8 * steps * ulp(want, torch.float64)
            assert error(got, want) <= bound, (name, shape, error(got, want), bound)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ANY + OWN, ids=repr)
def test_fifty_steps_against_float64(backend, kind):
    """Every partition, gradients over 12 decades."""
    kind, shapes = cases(kind)
    steps = 50 if sum(map(math.prod, shapes)) < 50_000 else 20
    check_steps(kind, shapes, (torch.float32,) * 3, backend, steps)


def test_columns_of_several_layers():
    """Rows that go four at a time, their leftovers, and sums of more than one unit of rows."""
    check_steps("column", [(520, 517), (7, 260)], (torch.float32,) * 3, steps=3)


def states_of(param):
    return sorted({param, torch.float32, torch.bfloat16}, key=str)


MIXES = [(p, g, m) for p in FLOATS for g in FLOATS for m in states_of(p)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("kind", ["coordinate", "row", Contiguous(7), "column", "global", "tensor"])
def test_dtypes_against_float64(dtypes, kind):
    check_steps(kind, SHAPES, dtypes, maximize=True, decades=6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_coordinate_is_adamw_bit_for_bit(dtypes):
    shapes = [s for s in SHAPES if 0 not in s] + [(300, 401)]
    p, m, v = problem("coordinate", shapes, dtypes)
    q, s, t = ([x.clone() for x in role] for role in (p, m, v))
    t = [x.view(shape) for x, shape in zip(t, shapes, strict=True)]
    for step in range(1, 5):
        grads = gradients(shapes, dtypes[1], step)
        options = {**OPTIONS, "step": step, "grad_scale": 3.0, "maximize": step % 2 == 0}
        fusedopt.blockwise_adam_step(p, grads, m, v, partitions="coordinate", **options)
        fusedopt.adamw_step(q, grads, s, t, **options)
    for a, b in [(p, q), (m, s), (v, t)]:
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.reshape(-1), y.reshape(-1))


def laid_out(x, layout):
    """A tensor of x's values in another layout."""
    if layout == "contiguous":
        return x.clone()
    if layout == "channels_last":
        return x.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "gaps":
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    assert layout == "offset"
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps", "offset"]
CONV = [
    "coordinate", "tensor", "row", "column", "global", Contiguous(7), Heads(n=2), Transposed("row"),
    [(slice(0, 2), "row"), (slice(2, 6), Heads(head_dim=2))],
    [(slice(0, 2), "tensor"), (slice(2, 6), "tensor")],
    [(slice(0, 2), "coordinate"), (slice(2, 6), "column")],
    Transposed(Heads(n=3)),
]  # fmt: skip


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", CONV, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts_give_the_numbers_of_contiguous_tensors(kind, dtype):
    """Blocks are those of row-major order, whatever the memory's.

    Where all roles lie alike, a block's sum may run in memory order: float64 then rounds otherwise,
    and float32 may round to the neighbour. Where they differ, the bits are the same on the CPU; a
    GPU then adds up in two passes.
    """
    shape = (6, 5, 3, 33)
    [g] = gradients([shape], dtype, 1)
    for inner in LAYOUTS:
        for outer in LAYOUTS:
            p, m, v = problem(kind, [shape], (dtype,) * 3)
            q, s = [laid_out(p[0], inner)], [laid_out(m[0], outer)]
            h, t = [laid_out(g, outer)], [v[0].clone()]
            for step in (3, 4):
                fusedopt.blockwise_adam_step(p, [g], m, v, partitions=kind, step=step, **OPTIONS)
                fusedopt.blockwise_adam_step(q, h, s, t, partitions=kind, step=step, **OPTIONS)
            same = {inner, outer} <= {"contiguous", "offset"}
            same |= "gaps" in (inner, outer) and not (where.FAKE or where.device == "cuda")
            rounding = 0.0 if same else torch.finfo(torch.float32).eps
            torch.testing.assert_close(t[0], v[0], rtol=rounding, atol=0.0)
            assert torch.equal(s[0], m[0])
            steps = 2 * OPTIONS["lr"] * rounding if dtype == torch.float64 else 0.0
            bound = steps + (2 * ulp(p[0].double().cpu().numpy(), dtype) if rounding else 0.0)
            assert error(q[0], p[0].double()) <= bound, (inner, outer)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", CONV, ids=repr)
def test_memory_order_is_used_where_it_can_be(kind):
    """Every element differs, so that a mixed-up block or element would show."""
    check = torch.arange(6 * 5 * 3 * 33, dtype=torch.float64).view(6, 5, 3, 33)
    for layout in ("channels_last", "transposed"):
        g = laid_out(check.float().to(where.device), layout)
        v = torch.zeros(partitions.block_count(kind, g.shape), device=where.device)
        p, m = torch.zeros_like(g), torch.zeros_like(g)
        options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        fusedopt.blockwise_adam_step([p], [g + 1], [m], [v], partitions=kind, step=1, **options)
        ids = torch.as_tensor(partitions.block_ids(kind, g.shape))
        squares = (check + 1).square().reshape(-1)
        want = torch.zeros(len(v), dtype=torch.float64).index_add_(0, ids.reshape(-1), squares)
        want /= torch.bincount(ids.reshape(-1))
        p, v = p.cpu(), v.cpu()
        torch.testing.assert_close(v.double(), want, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(p.double(), -(check + 1) / want.sqrt()[ids], rtol=1e-6, atol=0.0)


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[*_C.available_isas(), *where.DEVICES[1:]])
def place(request):
    """An instruction set of the CPU, or a real GPU under the marker gpu."""
    before = _C.isa()
    if request.param in _C.available_isas():
        _C.set_isa(request.param)
    else:
        where.device = request.param
    yield
    where.device = "cpu"
    _C.set_isa(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "kind", ["row", "global", "tensor", "column", Contiguous(70_001)], ids=repr
)
def test_same_bits_for_any_thread_count(isa, kind, dtype):
    shapes = [(100_003,), (5,), (520, 517), (70_000, 3), (1,), (64_000,)]
    results = []
    for threads in (1, 2, 3, 7):
        p, m, v = problem(kind, shapes, (dtype,) * 3)
        fusedopt.set_num_threads(threads)
        for step in (1, 2):
            grads = gradients(shapes, dtype, step)
            fusedopt.blockwise_adam_step(p, grads, m, v, partitions=kind, step=step, **OPTIONS)
        results.append([*p, *m, *v])
    fusedopt.set_num_threads(None)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def summed_shapes(kind):
    """The shapes on which a partition's blocks have more than one coordinate."""
    kind, shapes = cases(kind)
    if kind in ("coordinate", Contiguous(1)):
        return []
    return [s for s in shapes if len(s) > 1 or kind in ("tensor", "global")]


@pytest.mark.parametrize("kind", [k for k in ANY + OWN if summed_shapes(k)], ids=repr)
def test_every_instruction_set_sums_alike(kind):
    """Sums have one order everywhere, and squares of float32 are exact in float64.

    Coordinates, which are not summed, have AdamW's arithmetic: without FMA it rounds otherwise.
    """
    shapes = summed_shapes(kind)
    kind, _ = cases(kind)
    seconds = []
    before = _C.isa()
    try:
        for name in _C.available_isas():
            _C.set_isa(name)
            p, m, v = problem(kind, shapes, (torch.float32,) * 3)
            fusedopt.blockwise_adam_step(
                p, gradients(shapes, torch.float32, 1), m, v, partitions=kind, step=1
            )
            seconds.append([x for x, s in zip(v, shapes, strict=True) if math.prod(s) != len(x)])
    finally:
        _C.set_isa(before)
    for other in seconds[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seconds[0], other, strict=True))


def test_neighbours_in_the_list_change_no_bit(place):
    """A mixed list is, bit for bit, each tensor alone."""
    kinds = ["row", "column", Contiguous(7), "coordinate", "tensor"] * 3
    shapes = [s for s in SHAPES if 0 not in s][: len(kinds)] + [(40, 900)] * 6
    kinds = kinds[: len(shapes)]
    p, m, v = (
        [role[0] for role in roles]
        for roles in zip(
            *(problem(k, [s], (torch.float32,) * 3) for k, s in zip(kinds, shapes, strict=True)),
            strict=True,
        )
    )
    alone = [[x.clone() for x in role] for role in (p, m, v)]
    grads = gradients(shapes, torch.float32, 5)
    fusedopt.blockwise_adam_step(p, grads, m, v, partitions=kinds, step=2, **OPTIONS)
    for i, kind in enumerate(kinds):
        roles = ([role[i]] for role in (alone[0], [g.clone() for g in grads], *alone[1:]))
        fusedopt.blockwise_adam_step(*roles, partitions=kind, step=2, **OPTIONS)
    for a, b in zip((p, m, v), alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [k for k in ANY if k != "global"] + OWN, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_block(place, kind, bad):
    """NaN goes everywhere in its block; Inf stops the others' steps and spoils its own moment."""
    kind, shapes = cases(kind)
    p, m, v = problem(kind, shapes, (torch.float32,) * 3)
    q, s, t = ([x.clone() for x in role] for role in (p, m, v))
    grads = gradients(shapes, torch.float32, 1)
    fusedopt.blockwise_adam_step(p, grads, m, v, partitions=kind, step=1)
    for i, g in enumerate(grads):
        if not g.numel():
            continue
        at = g.numel() // 3
        g.view(-1)[at] = bad
        ids = partitions.block_ids(kind, g.shape).reshape(-1)
        block = torch.as_tensor(ids == ids[at])
        one = [[role[i]] for role in (q, grads, s, t)]
        fusedopt.blockwise_adam_step(*one, partitions=kind, step=1)
        ours, alone = q[i].reshape(-1).cpu(), p[i].reshape(-1).cpu()
        assert torch.equal(ours[~block], alone[~block])
        assert torch.equal(~t[i].cpu().isfinite(), torch.arange(len(t[i])) == ids[at])
        assert int((~s[i].isfinite()).sum()) == 1
        spoilt = ~ours.isfinite()
        assert torch.equal(spoilt, block) if bad != bad else int(spoilt.sum()) == 1


@pytest.mark.usefixtures("device")
def test_huge_gradients():
    """Squares beyond float32 still make a proper step: the block's sum and root are float64."""
    p, m, v = (torch.zeros(s, device=where.device) for s in ((64, 100), (64, 100), (64,)))
    g = torch.full_like(p, 1e30)
    fusedopt.blockwise_adam_step(
        [p], [g], [m], [v], partitions="row", step=1, lr=0.1, weight_decay=0.0
    )
    torch.testing.assert_close(p, torch.full_like(p, -0.1))
    assert v.isinf().all()


@pytest.mark.usefixtures("device")
def test_missing_and_empty_gradients():
    """They leave sum and count of a global block alone; all its tensors hold its value."""
    shapes = [(5, 3), (0,), (7,), (2, 2)]
    p, m, v = problem("global", shapes, (torch.float32,) * 3)
    q, s, t = ([x.clone() for x in role] for role in (p, m, v))
    grads = gradients(shapes, torch.float32, 1, decades=2)
    missing = [grads[0], grads[1], None, grads[3]]
    fusedopt.blockwise_adam_step(p, missing, m, v, partitions="global", step=3, **OPTIONS)
    few = [[role[i] for i in (0, 3)] for role in (q, grads, s, t)]
    fusedopt.blockwise_adam_step(*few, partitions="global", step=3, **OPTIONS)
    for i in (0, 3):
        assert torch.equal(p[i], q[i])
        assert torch.equal(m[i], s[i])
    assert torch.equal(p[2], q[2])
    assert {float(x) for x in v} == {float(t[0])}
    squares = torch.cat([grads[i].double().cpu().reshape(-1) for i in (0, 3)]).square()
    want = OPTIONS["betas"][1] * 0.3 + (1 - OPTIONS["betas"][1]) * float(squares.mean())
    assert float(v[0]) == pytest.approx(want, rel=1e-6)


def test_counters_scale_and_found_inf(place):
    shapes = [(12, 40), (7,), (100, 64)]
    p, m, v = problem("row", shapes, (torch.float32,) * 3)
    q, s, t = ([x.clone() for x in role] for role in (p, m, v))
    grads = gradients(shapes, torch.float32, 1)
    counters = [torch.tensor(float(i)) for i in range(3)]
    lr, decay = [0.1, 0.2, 0.3], [0.0, 0.1, 0.2]
    scaled = [g * 1024 for g in grads]
    options = {"partitions": "row", "lr": lr, "weight_decay": decay}
    args = (p, scaled, m, v)
    fusedopt.blockwise_adam_step(*args, step=counters, grad_scale=1024.0, found_inf=1.0, **options)
    assert [int(c) for c in counters] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
    fusedopt.blockwise_adam_step(*args, step=counters, grad_scale=1024.0, **options)
    assert [int(c) for c in counters] == [1, 2, 3]
    for i in range(3):
        one = [[role[i]] for role in (q, grads, s, t)]
        fusedopt.blockwise_adam_step(
            *one, partitions="row", step=i + 1, lr=lr[i], weight_decay=decay[i]
        )
    for a, b in [(p, q), (m, s), (v, t)]:  # a power of two scales without rounding
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def change(role, index, value):
    def apply(arrays, options):
        arrays[role][index] = value(arrays) if callable(value) else value

    return apply


def option(**new):
    return lambda arrays, options: options.update(new)


REFUSED = {
    "too few blocks": (change(3, 1, torch.zeros(4)), ValueError,
                       r"block_sqs\[1\] .*has 4 elements.*makes 5 blocks of params\[1\].*\(5, 8\)"),
    "dtype of blocks": (change(3, 1, torch.zeros(5).double()), TypeError,
                        r"block_sqs\[1\] .*float64.*float32"),
    "blocks with gaps": (change(3, 1, torch.zeros(10)[::2]), ValueError,
                         r"block_sqs\[1\].*contiguous"),
    "complex": (change(0, 1, torch.zeros(5, 8, dtype=torch.complex64)), TypeError,
                r"params\[1\] .*complex64.*complex"),
    "integer": (change(1, 1, torch.zeros(5, 8, dtype=torch.int32)), TypeError,
                r"grads\[1\] .*floating-point"),
    "shape": (change(1, 1, torch.zeros(8, 5)), ValueError, r"grads\[1\] .*shape differs"),
    "state": (change(2, 1, torch.zeros(5, 8).double()), TypeError, r"exp_avgs\[1\] .*float64"),
    "one array twice": (change(3, 1, lambda a: a[3][0][:5]), ValueError,
                        r"block_sqs\[[01]\] is written, but shares memory with block_sqs"),
    "blocks in a gradient": (change(1, 1, lambda a: a[3][1].expand(8, 5).t()), ValueError,
                             r"block_sqs\[1\] is written, but shares memory with grads\[1\]"),
    "expanded": (change(0, 1, torch.zeros(5, 1).expand(5, 8)), ValueError,
                 r"params\[1\] .*share memory"),
    "no partition": (option(partitions="rows"), ValueError, "partition is 'rows'"),
    "number": (option(partitions=3), TypeError, "3"),
    "does not divide": (option(partitions=Heads(n=3)), ValueError, r"params\[0\].*Heads\(n=3\)"),
    "too few partitions": (option(partitions=["row"]), ValueError, "1 entries.*2"),
    "global of two values": (
        lambda a, o: (o.update(partitions="global"),
                      a[3].__setitem__(0, torch.ones(1)), a[3].__setitem__(1, torch.zeros(1))),
        ValueError, r"block_sqs\[1\].*another tensor of the same 'global' block"),
    "step": (option(step=0), ValueError, "step is 0"),
    "lr": (option(lr=-1.0), ValueError, "lr is -1.0"),
    "backend": (option(backend="triton"), RuntimeError, "'triton' is not available"),
}  # fmt: skip


# A value on a GPU is not looked at.
MARKS = {"global of two values": where.not_on_fake}


@pytest.mark.parametrize("case", [pytest.param(c, marks=MARKS.get(c, ())) for c in REFUSED])
def test_refused_before_the_first_write(case):
    apply, kind, message = REFUSED[case]
    shapes = [(7, 3), (5, 8)]
    p, m, v = problem("row", shapes, (torch.float32,) * 3)
    arrays = [p, gradients(shapes, torch.float32, 1), m, v]
    options = {"partitions": "row", "step": 1}
    apply(arrays, options)
    before = [role[0].clone() for role in arrays]
    with pytest.raises(kind, match=message):
        fusedopt.blockwise_adam_step(*arrays, **options)
    assert all(torch.equal(x, role[0]) for x, role in zip(before, arrays, strict=True))


def test_a_changed_partition_is_seen():
    """Plans remember partitions by place and shape; another one there is asked for anew."""
    p, m, _ = problem("row", [(6, 8)], (torch.float32,) * 3)
    for kind in ["row", "tensor", [(slice(0, 2), "row"), (slice(2, 6), "tensor")], "row"]:
        v = [torch.zeros(partitions.block_count(kind, (6, 8)))]
        g = gradients([(6, 8)], torch.float32, 1)
        fusedopt.blockwise_adam_step(p, g, m, v, partitions=kind, step=1)
        want = torch.zeros(len(v[0]), dtype=torch.float64)
        ids = torch.as_tensor(partitions.block_ids(kind, (6, 8))).reshape(-1)
        want.index_add_(0, ids, g[0].double().square().reshape(-1))
        torch.testing.assert_close(v[0].double(), 1e-3 * want / torch.bincount(ids))


def test_numpy_arrays():
    p, g, m = (np.full((4, 6), x, np.float32) for x in (1.0, 2.0, 0.0))
    v = np.zeros(4, np.float32)
    fusedopt.blockwise_adam_step([p], [g], [m], [v], partitions="row", step=1)
    np.testing.assert_allclose(v, 4e-3, rtol=1e-6)
    assert fusedopt.supports("blockwise_adam_step", "cpu", ["bfloat16"]) == (True, "")
    assert not fusedopt.supports("blockwise_adam_step", "cpu", ["complex64"])[0]
