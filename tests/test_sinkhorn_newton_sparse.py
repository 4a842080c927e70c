"""Entropic optimal transport: every backend against truth in extended precision, and hard cases."""

import itertools
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import _C
from fusedopt.references import sinkhorn_newton_sparse as reference

BACKENDS = ["cpu", "reference"]
solve = fusedopt.sinkhorn_newton_sparse
LONG = np.longdouble
needs_long = pytest.mark.skipif(np.finfo(LONG).nmant < 63, reason="no 80-bit numbers here")


def random(n, m, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return rng.random((n, m)), a / a.sum(), b / b.sum()


def images(power, size=12, seed=0):
    rng = np.random.default_rng(seed)
    points = np.stack(np.mgrid[0:size, 0:size], -1).reshape(-1, 2).astype(float)
    d = abs(points[:, None] - points)
    cost = {"l1": d.sum(-1), "l2": np.sqrt((d**2).sum(-1)), "sq": (d**2).sum(-1)}[power]
    a, b = (
        sum(np.exp(-((points - rng.uniform(2, size - 2, 2)) ** 2).sum(1) / 4) for _ in range(3))
        + 0.01
        for _ in range(2)
    )
    return cost / cost.max(), a / a.sum(), b / b.sum()


def mixture(n=120):
    x = np.linspace(0, 5, n)
    a = np.exp(-x)
    b = np.exp(-0.5 * ((x - 1) / 0.2) ** 2) + 0.8 * np.exp(-0.5 * ((x - 3) / 0.5) ** 2) + 1e-9
    return (x[:, None] - x) ** 2 / 25, a / a.sum(), b / b.sum()


def cloud(n, dimensions, seed=0):
    rng = np.random.default_rng(seed)
    cost = ((rng.normal(size=(n, 1, dimensions)) - rng.normal(size=(n, dimensions))) ** 2).sum(-1)
    return cost / cost.max(), np.full(n, 1 / n), np.full(n, 1 / n)


FAMILIES = {
    "assignment": (random(60, 60), 1 / 1200),
    "wide": (random(23, 70), 1 / 300),
    "tall": (random(70, 23), 1 / 300),
    "easy": (random(40, 33), 0.1),
    "images L1": (images("l1"), 1 / 1200),
    "images L2": (images("l2"), 1 / 1200),
    "images squared": (images("sq"), 1 / 1200),
    "mixture": (mixture(), 1e-3),
    "cloud": (cloud(100, 3), 1e-3),
    "sharp": (random(80, 80), 1e-4),
    "30 dimensions": (cloud(100, 30), 1e-4),
}


def error_of(cost, a, b, f, g, reg):
    with np.errstate(invalid="ignore"):
        plan = np.exp((f[:, None] + g - cost) / reg)
    return plan, abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum()


def polished(cost, a, b, reg, g):
    """Potentials and dual value in extended precision: Newton from a float64 solution."""
    cost, a, b, g = (np.asarray(x, LONG) for x in (cost, a, b, g))
    b = b * (a.sum() / b.sum())
    reg = LONG(reg)
    for _ in range(40):
        rows = (g - cost) / reg
        top = rows.max(1)
        f = reg * (np.log(a) - top - np.log(np.exp(rows - top[:, None]).sum(1)))
        plan = np.exp((f[:, None] + g - cost) / reg)
        gap = b - plan.sum(0)
        if abs(gap).sum() < 1e-15:
            return f, g, f @ a + g @ b, (plan * cost).sum()
        hessian = (np.diag(plan.sum(0)) - plan.T @ (plan / a[:, None])).astype(float)
        step = np.linalg.lstsq(hessian, gap.astype(float), rcond=1e-14)[0]
        g = g + reg * np.clip(
            step, -1, 1
        )  # what rounding leaves of tiny eigenvalues is no direction
    raise AssertionError(f"not polished: {abs(gap).sum()}")


@needs_long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_against_truth(family, backend):
    (cost, a, b), reg = FAMILIES[family]
    result = solve(cost, a, b, reg=reg, backend=backend)
    assert result.converged and result.marginal_error <= 1e-8
    plan, error = error_of(cost, a, b, result.f, result.g, reg)
    assert error <= 1.01e-8 + 4e-16 / reg
    np.testing.assert_allclose(result.plan(), plan, rtol=1e-15 / reg, atol=1e-300)
    _, _, value, spent = polished(cost, a, b, reg, result.g)
    assert abs(result.value - value) <= 1e-10
    assert abs(result.cost - spent) <= 1e-7
    assert abs(result.cost - (plan * cost).sum()) <= 1e-13
    assert abs(result.f @ a - result.g @ b) <= 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_over_relaxed_sinkhorn_finds_the_same(family):
    (cost, a, b), reg = FAMILIES[family]
    newton = solve(cost, a, b, reg=reg)
    relaxed = solve(cost, a, b, reg=reg, method="sinkhorn", max_iter=30000, tol=1e-6)
    if family not in ("sharp", "30 dimensions"):  # out of Sinkhorn's reach
        assert relaxed.converged
        assert abs(relaxed.value - newton.value) <= 1e-9
    plain = solve(cost, a, b, reg=reg, method="sinkhorn", tol=1e-6, max_iter=5, backend="reference")
    assert plain.iterations == 5


def test_over_relaxation_saves_iterations():
    (cost, a, b), reg = FAMILIES["images squared"]
    plain = solve(cost, a, b, reg=reg, method="sinkhorn", backend="reference")
    relaxed = solve(cost, a, b, reg=reg, method="sinkhorn")
    assert plain.converged and relaxed.converged
    assert relaxed.iterations < plain.iterations / 2


@pytest.mark.parametrize(
    ("n", "reg", "make"),
    [
        (500, 1e-4, lambda n: random(n, n)),
        (300, 1e-7, lambda n: random(n, n)),
        (400, 2e-4, lambda n: cloud(n, 30)),
        (300, 2e-4, lambda n: cloud(n, 3)),
    ],
)
def test_nearly_disconnected_plans(n, reg, make):
    cost, a, b = make(n)
    result = solve(cost, a, b, reg=reg)
    assert result.converged
    assert error_of(cost, a, b, result.f, result.g, reg)[1] <= 1.01e-8 + 2e-15 / reg


def test_the_papers_counts():
    """Table 1: 20 + 9 iterations for a random assignment of 500, to machine accuracy."""
    cost = np.random.default_rng(0).random((500, 500))
    result = solve(cost, reg=1 / 1200, tol=1e-12, method="sns-paper", backend="reference")
    stages = [step.stage for step in result.trace]
    assert result.converged
    assert stages[:20] == ["sinkhorn"] * 20
    assert set(stages[20:]) == {"newton"} and 8 <= len(stages) - 20 <= 12
    with pytest.raises(ValueError, match="'sns-paper' runs on backend 'reference' only"):
        solve(cost, reg=1 / 1200, method="sns-paper")


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_pairs_and_empty_marginals(backend):
    cost, a, b = random(30, 40)
    cost[np.random.default_rng(1).random(cost.shape) < 0.3] = np.inf
    a[[0, 7]] = 0
    b[[3, 39]] = 0
    a, b = a / a.sum(), b / b.sum()
    cost[0] = np.inf  # nothing leaves it, so nothing is wrong
    result = solve(cost, a, b, reg=0.01, backend=backend)
    plan = result.plan()
    assert result.converged
    assert (plan[~np.isfinite(cost)] == 0).all()
    assert (result.f[[0, 7]] == -np.inf).all() and (result.g[[3, 39]] == -np.inf).all()
    assert (plan[[0, 7]] == 0).all() and (plan[:, [3, 39]] == 0).all()
    assert np.isfinite([result.cost, result.value]).all()
    inner = np.ix_(a > 0, b > 0)
    without = solve(cost[inner], a[a > 0], b[b > 0], reg=0.01, backend=backend)
    assert abs(without.value - result.value) <= 1e-12
    np.testing.assert_allclose(without.plan(), plan[inner], atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3), (17, 16), (31, 33), (4, 255)])
def test_shapes(shape, backend):
    cost, a, b = random(*shape)
    result = solve(cost * 7 - 3, 5 * a, 5 * b, reg=0.05, backend=backend)
    assert result.converged
    assert error_of(cost * 7 - 3, 5 * a, 5 * b, result.f, result.g, 0.05)[1] <= 1e-8


def test_marginals_default_to_uniform():
    cost, _, _ = random(7, 9)
    given = solve(cost, np.full(7, 1 / 7), np.full(9, 1 / 9), reg=0.1)
    assert (solve(cost, reg=0.1).f == given.f).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, np.float32])
def test_dtypes_and_frameworks(kind):
    cost, a, b = random(50, 60)
    if isinstance(kind, torch.dtype):
        cost, a, b = (torch.from_numpy(x).to(kind) for x in (cost, a, b))
    else:
        cost, a, b = (x.astype(kind) for x in (cost, a, b))
    result = solve(cost, a, b, reg=0.002)
    assert result.converged
    assert isinstance(result.f, type(cost)) and isinstance(result.plan(), type(cost))
    wide = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    limit = 1e-8 if kind == torch.float64 else 1e-6  # sums of float32 marginals differ by rounding
    assert error_of(*wide, np.asarray(result.f), np.asarray(result.g), 0.002)[1] <= limit


def test_the_plan_of_tensors_is_as_exact_as_that_of_arrays():
    cost, a, b = random(50, 60)
    result = solve(torch.from_numpy(cost), a, b, reg=0.0123)
    expected = solve(cost, a, b, reg=0.0123).plan()
    assert np.abs(result.plan().numpy() - expected).max() <= 1e-12 * expected.max()


def test_layouts_are_read_right():
    cost, a, b = random(33, 47)
    expected = solve(cost, a, b, reg=0.01)
    gaps = np.zeros((40, 100))
    gaps[3:36, 5:52] = cost
    for same in (np.asfortranarray(cost), gaps[3:36, 5:52], torch.from_numpy(cost.T.copy()).T):
        assert (np.asarray(solve(same, a, b, reg=0.01).f) == expected.f).all()


@pytest.mark.parametrize("family", ["assignment", "images L1", "easy", "30 dimensions"])
def test_threads_give_the_same_bits(family):
    (cost, a, b), reg = FAMILIES[family]
    cost, a, b = np.tile(cost, (3, 3)), np.tile(a / 3, 3), np.tile(b / 3, 3)
    results = []
    for threads in (1, 2, 5):
        fusedopt.set_num_threads(threads)
        try:
            results.append(solve(cost, a, b, reg=reg))
        finally:
            fusedopt.set_num_threads(None)
    for other in results[1:]:
        assert (other.f == results[0].f).all() and (other.g == results[0].g).all()
        assert other.trace == results[0].trace


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_have_the_bits_of_single_problems(threads):
    problems = [random(20, 31, seed) for seed in range(7)]
    cost, a, b = (np.stack(x) for x in zip(*problems, strict=True))
    reg = np.geomspace(0.1, 1e-3, 7)
    fusedopt.set_num_threads(threads)
    try:
        batch = solve(cost, a, b, reg=reg)
        singles = [solve(*p, reg=r) for p, r in zip(problems, reg, strict=True)]
        mixed = solve([p[0] for p in problems], [p[1] for p in problems], [p[2] for p in problems],
                      reg=list(reg))  # fmt: skip
    finally:
        fusedopt.set_num_threads(None)
    assert batch.converged.all() and len(set(batch.iterations)) > 1
    for i, single in enumerate(singles):
        assert (batch.f[i] == single.f).all() and (batch.g[i] == single.g).all()
        assert (batch.value[i], batch.cost[i]) == (single.value, single.cost)
        assert batch[i].trace == single.trace == batch.trace[i]
        assert (batch.plan()[i] == single.plan()).all()
        assert (mixed[i].f == single.f).all()


def test_warm_start():
    (cost, a, b), reg = FAMILIES["images L2"]
    cold = solve(cost, a, b, reg=reg)
    near = solve(cost * (1 + 1e-6), a, b, reg=reg, g=cold.g)
    assert near.converged and near.iterations < cold.iterations / 3
    assert solve(cost, a, b, reg=reg, f=cold.f).converged
    assert solve(cost, a, b, reg=reg, f=cold.f, g=cold.g).iterations <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_solved_says_so(backend):
    (cost, a, b), reg = FAMILIES["assignment"]
    result = solve(cost, a, b, reg=reg, max_iter=4, backend=backend)
    assert not result.converged and result.iterations == 4
    assert 1e-8 < result.marginal_error < 2.5
    assert error_of(cost, a, b, result.f, result.g, reg)[1] == pytest.approx(
        result.marginal_error, rel=1e-6
    )


def test_infeasible_patterns_end():
    """Two rows that only one column takes in, with more mass than it has."""
    cost = np.zeros((3, 3))
    cost[:2, 1:] = np.inf
    result = solve(cost, reg=0.1, max_iter=200)
    assert not result.converged and result.marginal_error > 0.1


def test_trace():
    (cost, a, b), reg = FAMILIES["assignment"]
    result = solve(cost, a, b, reg=reg)
    assert len(result.trace) == result.iterations
    newton = [step for step in result.trace if step.stage == "newton"]
    assert newton and {step.stage for step in result.trace} == {"newton", "sinkhorn"}
    assert all(
        0 < s.nnz <= cost.size + 16 * 60 and s.cg_iterations > 0 and 0 < s.step <= 1 for s in newton
    )
    assert result.trace[-1].reg == reg and result.trace[0].reg > reg
    assert result.trace[-1].marginal_error == pytest.approx(
        result.marginal_error, rel=0.1, abs=1e-10
    )


def test_single_steps():
    (cost, a, b), reg = FAMILIES["images squared"]
    dense = reference._Dense(cost, a, b)
    g = dense.column_potential(dense.row_potential(np.zeros(len(b)), reg), reg)
    one = fusedopt.sinkhorn_step(cost, a, b, reg=reg)
    shift = np.mean(one.g - g)
    np.testing.assert_allclose(one.g, g + shift, atol=1e-12)
    assert one.iterations == 1 and one.trace[0].stage == "sinkhorn"

    near = solve(cost, a, b, reg=reg, tol=1e-3)
    newton = fusedopt.sns_newton_step(cost, a, b, reg=reg, g=near.g)
    sinkhorn = fusedopt.sinkhorn_step(cost, a, b, reg=reg, g=near.g)
    assert newton.trace[0].stage == "newton" and newton.iterations == 1
    assert newton.marginal_error < sinkhorn.marginal_error < near.marginal_error


def softmax(x):
    return torch.softmax(x, -1)


def test_gradients():
    rng = torch.Generator().manual_seed(0)
    cost = torch.rand(5, 6, generator=rng, dtype=torch.float64).requires_grad_()
    x = torch.randn(5, generator=rng, dtype=torch.float64).requires_grad_()
    y = torch.randn(6, generator=rng, dtype=torch.float64).requires_grad_()

    def value(cost, x, y):
        return solve(cost, softmax(x), softmax(y), reg=0.1, tol=1e-12).value

    assert torch.autograd.gradcheck(value, (cost, x, y), atol=1e-7, rtol=1e-5)


def test_gradients_of_scaled_marginals_and_batches():
    """Both marginals times t: the mass changes too."""
    cost, a, b = (
        torch.from_numpy(np.stack(x)) for x in zip(random(4, 5), random(4, 5, 1), strict=False)
    )
    t = torch.tensor([1.3, 0.7], dtype=torch.float64).requires_grad_()
    cost.requires_grad_()

    def value(t, cost):
        return solve(cost, t[:, None] * a, t[:, None] * b, reg=[0.1, 0.3], tol=1e-12).value

    assert torch.autograd.gradcheck(value, (t, cost), atol=1e-7, rtol=1e-5)
    assert solve(cost[0], reg=0.1).value.shape == ()


def rand(*shape, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=numbers, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 6), (12, 9), (1, 3)])
def test_gradients_of_plans_and_potentials(shape, backend):
    n, m = shape
    given = [rand(n, m).abs(), rand(n, seed=1), rand(m, seed=2)]

    def outputs(cost, x, y):
        result = solve(cost, softmax(x), softmax(y), reg=0.1, tol=1e-13, backend=backend)
        return result.plan(), result.f, result.g

    assert torch.autograd.gradcheck(
        outputs, [x.requires_grad_() for x in given], atol=1e-6, rtol=1e-4
    )


def test_gradients_of_a_batch_of_plans():
    """One marginal for all problems, one for each; and a problem of the batch alone."""
    given = [rand(3, 7, 5).abs(), rand(7, seed=1), rand(3, 5, seed=2)]

    def outputs(cost, x, y):
        result = solve(cost, softmax(x), softmax(y), reg=[0.1, 0.03, 0.2], tol=1e-13)
        return result.plan(), result[1].plan(), result[2].f

    assert torch.autograd.gradcheck(
        outputs, [x.requires_grad_() for x in given], atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize(("family", "reg"), [("images L1", 1e-2), ("assignment", 3e-3)])
def test_gradients_of_larger_plans_along_a_direction(family, reg):
    """Differences of the plan itself, on a graph with runs and isolated entries."""
    cost, a, b = (torch.from_numpy(x) for x in FAMILIES[family][0])
    weights, direction = rand(*cost.shape, seed=1), rand(*cost.shape, seed=2)
    move = rand(len(a), seed=3) * a
    move -= a * move.sum() / a.sum()

    def loss(t):
        result = solve(cost + t * direction, a + t * move, b, reg=reg, tol=1e-12)
        return (result.plan() * weights).sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss(t).backward()
    h = 1e-4 * reg
    with torch.no_grad():
        difference = (loss(t.detach() + h) - loss(t.detach() - h)) / (2 * h)
    assert float(t.grad) == pytest.approx(float(difference), rel=1e-5)


def test_gradients_by_both_backends_where_mass_and_ways_are_missing():
    cost, a, b = random(20, 17)
    cost[np.random.default_rng(1).random(cost.shape) < 0.3] = np.inf
    a[[0, 7]] = 0
    b[3] = 0
    weights = rand(20, 17)
    grads = []
    for backend in BACKENDS:
        given = [torch.tensor(x).requires_grad_() for x in (cost, a / a.sum(), b / b.sum())]
        (solve(*given, reg=0.05, tol=1e-12, backend=backend).plan() * weights).sum().backward()
        grads.append([x.grad for x in given])
    difference = grads[0][1] - grads[1][1]  # balanced changes see no common shift of both sides
    shift = difference[1]
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-10, rtol=0)
    for side, mass, sign in ((1, a, 1), (2, b, -1)):
        kept = torch.from_numpy(mass > 0)
        moved = grads[1][side] + sign * shift
        torch.testing.assert_close(grads[0][side][kept], moved[kept], atol=1e-8, rtol=0)
        assert grads[0][side].isfinite().all()


def test_callback_sees_the_trace():
    (cost, a, b), reg = FAMILIES["assignment"]
    for backend in BACKENDS:
        seen = []
        result = solve(cost, a, b, reg=reg, backend=backend, callback=seen.append)
        assert seen == result.trace
        assert (solve(cost, a, b, reg=reg, backend=backend).f == result.f).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["sns", "sinkhorn"])
def test_callback_stops(method, backend):
    (cost, a, b), reg = FAMILIES["assignment"]
    stop = itertools.count(1)
    result = solve(
        cost, a, b, reg=reg, method=method, backend=backend, callback=lambda step: next(stop) == 6
    )
    assert result.iterations == 6 and not result.converged
    assert error_of(cost, a, b, result.f, result.g, reg)[1] == pytest.approx(
        result.marginal_error, rel=1e-6
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_callback_of_many_problems(threads):
    """It is told which problem; it may stop one; what it raises ends all and comes out."""
    cost = np.random.default_rng(0).random((4, 30, 30))
    fusedopt.set_num_threads(threads)
    try:
        seen = []
        batch = solve(cost, reg=0.01, callback=lambda step, i: seen.append(i) or i == 2)
        assert [seen.count(i) for i in range(4)] == list(batch.iterations)
        assert batch.iterations[2] == 1 and list(batch.converged) == [True, True, False, True]
        seen.clear()
        solve(list(cost[:2]), reg=0.01, callback=lambda step, i: seen.append(i))
        assert set(seen) == {0, 1}

        def fail(step, i):
            raise LookupError(f"problem {i}")

        with pytest.raises(LookupError, match="problem"):
            solve(cost, reg=0.01, callback=fail)
    finally:
        fusedopt.set_num_threads(None)
    with pytest.raises(TypeError, match="callback is int"):
        solve(cost, reg=0.01, callback=3)


def test_progress(capsys, monkeypatch):
    cost, a, b = random(30, 30)
    result = solve(cost, a, b, reg=0.01, progress=True)
    assert f"{result.iterations} iterations" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install fusedopt\[progress\]"):
        solve(cost, a, b, reg=0.01, progress=True)


def allocated(call):
    """The result, and the most bytes that NumPy held beyond those before."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    result = call()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return result, most


@pytest.mark.parametrize("case", ["assignment", "mixture"])
def test_memory(case):
    """At most two arrays of the cost's size, one with low_memory; also where the plan is dense."""
    (cost, a, b), reg = (random(600, 600), 1e-3) if case == "assignment" else (mixture(600), 0.02)
    usual, most = allocated(lambda: solve(cost, a, b, reg=reg))
    assert cost.nbytes / 2 < most <= 2 * cost.nbytes
    lean, most = allocated(lambda: solve(cost, a, b, reg=reg, low_memory=True))
    assert most <= cost.nbytes
    assert usual.converged and lean.converged
    assert abs(usual.value - lean.value) <= 1e-12
    for method, backend in (("sinkhorn", "cpu"), ("sns", "reference")):
        options = {"method": method, "backend": backend, "max_iter": 3}
        assert solve(cost, a, b, reg=reg, low_memory=True, **options).iterations == 3


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (3, 8), (1, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_matrices(shape, dtype):
    """Solved side by side; those that take long or leave the range of exp by the full solver."""
    rng = np.random.default_rng(0)
    cost = rng.random((301, *shape)).astype(dtype)
    reg = np.geomspace(1e-4, 10, 301)
    result = solve(cost, reg=reg)
    assert result.converged.all() and (result.marginal_error <= 1e-8).all()
    assert len(set(result.iterations)) > 1 or shape == (1, 2)
    for i in range(0, 301, 50):
        single = solve(cost[i], reg=reg[i])
        assert (result.f[i] == single.f).all() and result.value[i] == single.value
        assert result[i].trace == single.trace and len(single.trace) == single.iterations
        # Another way to the same: Newton from a start goes by the full solver.
        again = solve(cost[i], reg=reg[i], g=single.g * 0.9)
        assert abs(again.value - single.value) <= 1e-12 + 1e-9 * reg[i]
        assert abs(again.cost - single.cost) <= 1e-6
        plan, error = error_of(
            cost[i].astype(float), 1 / shape[0], 1 / shape[1], single.f, single.g, reg[i]
        )
        assert error <= 1.01e-8 + 4e-16 / reg[i]
        assert abs((plan * cost[i]).sum() - single.cost) <= 1e-13 + 4e-16 / reg[i]


def test_tiny_matrices_with_forbidden_pairs_and_empty_marginals():
    cost = np.random.default_rng(0).random((40, 4, 4))
    cost[:, 0, 1:3] = np.inf
    marginals = np.array([0, 0.5, 0.25, 0.25])
    result = solve(cost, marginals, marginals[::-1].copy(), reg=0.1)
    assert result.converged.all()
    assert (result.f[:, 0] == -np.inf).all() and (result.g[:, 3] == -np.inf).all()
    assert np.isfinite(result.value).all() and (result.plan()[:, 0] == 0).all()
    expected = solve(cost, marginals, marginals[::-1].copy(), reg=0.1, backend="reference")
    np.testing.assert_allclose(result.value, expected.value, atol=1e-14)


def test_traces_of_many_problems_end_early():
    result = solve(np.random.default_rng(0).random((20000, 3, 3)), reg=0.1)
    assert 16 <= len(result[0].trace) <= 17 or len(result[0].trace) == result.iterations[0]
    none = solve(np.random.default_rng(0).random((30000, 2, 2)), reg=0.1)
    assert none[0].trace == [] and none.converged.all()


def test_one_marginal_for_all_problems():
    """A marginal of one row, copied to all problems, lay by columns: the binding refused it."""
    cost, a, b = random(12, 9)
    batch = np.stack([cost, cost[::-1]])
    shared = solve(batch, a, b, reg=0.1)
    assert (shared.f == solve(batch, np.stack([a, a]), np.stack([b, b]), reg=0.1).f).all()


def test_large_costs_are_looked_at_in_parts():
    """The first of several wrong elements is named, whatever part finds its own first."""
    cost, a, b = random(400, 500)
    cost[399, 1] = cost[123, 45] = cost[123, 46] = NAN
    with pytest.raises(ValueError, match=r"NaN at \(123, 45\)"):
        solve(cost, a, b, reg=0.1)
    cost, a, b = random(400, 500)
    cost[:, 499] = cost[350] = np.inf
    with pytest.raises(ValueError, match="row 350 has mass"):
        solve(cost, a, b, reg=0.1)
    cost[350, 0] = 1
    with pytest.raises(ValueError, match="column 499 has mass"):
        solve(cost, a, b, reg=0.1)


NAN = float("nan")
BAD = [
    ({"cost": [[1.0]]}, TypeError, "cost"),
    ({"cost": np.zeros((2, 3), np.int64)}, TypeError, r"cost \(shape \(2, 3\), int64\)"),
    ({"cost": np.zeros(3)}, ValueError, r"cost \(shape \(3,\).*expected \(n, m\)"),
    ({"cost": np.zeros((0, 3))}, ValueError, "no elements"),
    ({"cost": np.array([[0, 1, NAN], [0, 0, 0]])}, ValueError, r"cost has NaN at \(0, 2\)"),
    ({"cost": np.array([[0, 1, 2], [0, -np.inf, 0]])}, ValueError, r"-inf at \(1, 1\)"),
    ({"cost": np.array([[0, 1, 2], [np.inf] * 3])}, ValueError, "row 1 has mass"),
    ({"cost": np.array([[0, np.inf, 2], [0, np.inf, 1]])}, ValueError, "column 1 has mass"),
    ({"a": np.array([0.5, 0.4])}, ValueError, "a sums to 0.9"),
    ({"a": np.array([1.5, -0.5])}, ValueError, r"a\[1\] is negative"),
    ({"b": np.array([0.5, 0.5, NAN])}, ValueError, r"b\[2\] is not finite"),
    ({"a": np.ones(3)}, ValueError, r"a \(shape \(3,\), float64\): expected shape \(2,\)"),
    ({"a": np.ones(2, np.int32)}, TypeError, "a .*int32"),
    ({"a": np.zeros(2)}, ValueError, "sums to zero"),
    ({"a": 0.5}, TypeError, "a is float"),
    ({"reg": 0.0}, ValueError, "reg is 0.0"),
    ({"reg": NAN}, ValueError, "reg is nan"),
    ({"reg": [0.1, 0.2]}, ValueError, "reg has shape"),
    ({"reg": 1e-8}, ValueError, "expected at least 1e-07 of the largest cost"),
    ({"tol": 0.0}, ValueError, "tol"),
    ({"max_iter": 0}, ValueError, "max_iter"),
    ({"method": "newton"}, ValueError, "method is 'newton'"),
    ({"g": np.zeros(2)}, ValueError, r"g has shape \(2,\), expected \(3,\)"),
    ({"f": np.array([0, NAN])}, ValueError, "f .*not finite"),
    ({"backend": "triton4"}, ValueError, "backend is 'triton4'"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_errors(change, kind, message, backend):
    arguments = {"cost": np.arange(6.0).reshape(2, 3), "reg": 0.1, "backend": backend} | change
    with pytest.raises(kind, match=message):
        solve(arguments.pop("cost"), **arguments)


def test_lists_want_lists():
    cost = np.zeros((2, 2))
    with pytest.raises(ValueError, match="a has 1 entries, cost has 2"):
        solve([cost, cost], [np.ones(2)], reg=0.1)
    with pytest.raises(TypeError, match="a is ndarray, expected a list"):
        solve([cost, cost], np.ones(2), reg=0.1)


def test_gpu_backends_refuse():
    answer, why = fusedopt.supports("sinkhorn_newton_sparse", "triton", device="cuda")
    assert not answer and why
    for backend in ("cuda", "triton"):
        with pytest.raises((RuntimeError, ValueError), match=backend):
            solve(np.zeros((2, 2)), reg=0.1, backend=backend)
    assert fusedopt.supports("sinkhorn_newton_sparse", "cpu", ["float32", "float64"]) == (True, "")
    assert not fusedopt.supports("sinkhorn_newton_sparse", "cpu", ["bfloat16"])[0]


def test_memory_is_below_two_matrices():
    for n, m in ((500, 500), (2000, 2000), (300, 4000)):
        assert _C.transport_workspace_bytes(n, m, False) <= 2 * 8 * n * m
        assert _C.transport_workspace_bytes(n, m, True) <= 8 * n * m


INSTRUCTION_SETS = """
import sys, numpy as np, fusedopt
rng = np.random.default_rng(3)
cost = rng.random((70, 45)).astype(sys.argv[2])
fusedopt._C.set_isa(sys.argv[1])
result = fusedopt.sinkhorn_newton_sparse(cost, reg=1e-3)
assert result.converged
expected = fusedopt.sinkhorn_newton_sparse(cost, reg=1e-3, backend="reference")
np.testing.assert_allclose(result.f, expected.f, atol=1e-9)
assert abs(result.value - expected.value) < 1e-13, result.value - expected.value
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", _C.available_isas())
def test_instruction_sets(isa, dtype):
    command = [sys.executable, "-c", INSTRUCTION_SETS, isa, dtype]
    subprocess.run(command, check=True)


def test_the_unregularised_limit():
    """At small reg the cost is that of the best assignment, here by brute force."""
    cost, _, _ = random(6, 6)
    best = min(
        sum(cost[i, j] for i, j in enumerate(p)) / 6 for p in itertools.permutations(range(6))
    )
    assert math.isclose(solve(cost, reg=1e-4).cost, best, abs_tol=1e-6)
