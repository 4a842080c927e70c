"""fusedopt.ot: POT's and geomloss's calling styles, against closed forms and POT's own numbers."""

import numpy as np
import pytest
import torch

from fusedopt import ot

rng = np.random.default_rng(0)
M = rng.random((4, 5))
A, B = rng.random(4) + 0.1, rng.random(5) + 0.1
A, B = A / A.sum(), B / B.sum()
X, Y = rng.random(4), rng.random(5)
REG = 0.1
# What POT 0.9.7 gives for these (bench/sinkhorn_newton_sparse.py compares with the one installed).
POT = {"linear": 0.2700732096747983, "KL": 0.33727712623689865, "entropy": 0.0633703363507015}
POT_SQUARES = 0.0559511929092736
POT_SAMPLES = {"value": 0.10175596817170403, "value_linear": 0.08154405542403166}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_solve_is_pots(reg_type, kind):
    result = ot.solve(kind(M), kind(A), kind(B), REG, reg_type=reg_type)
    assert float(result.value) == pytest.approx(POT[reg_type], abs=1e-12)
    assert float(result.value_linear) == pytest.approx(POT["linear"], abs=1e-8)
    u, v = (np.asarray(x) for x in result.potentials)
    plan = np.asarray(result.plan)
    np.testing.assert_allclose(plan, np.exp(u[:, None] + v - M / REG), rtol=1e-12)
    np.testing.assert_allclose(result.marginals[0], A, atol=1e-8)
    np.testing.assert_allclose(result.marginal_b, B, atol=1e-8)
    assert result.status == "converged"
    assert result.log["niter"] == len(result.log["trace"]) and result.log["err"] <= 1e-8
    assert (ot.sinkhorn(kind(A), kind(B), kind(M), REG, stopThr=1e-8) == result.plan).all()


def test_two_by_two_in_closed_form():
    cost = np.array([[0.0, 1], [1, 0]])
    for reg in (0.05, 1.0):
        stay = 0.5 / (1 + np.exp(-1 / reg))
        result = ot.solve(cost, reg=reg)
        plan = np.array([[stay, 0.5 - stay], [0.5 - stay, stay]])
        np.testing.assert_allclose(result.plan, plan, atol=1e-8)
        assert result.value_linear == pytest.approx(1 - 2 * stay, abs=1e-8)
        value = 1 - 2 * stay + reg * (plan * np.log(plan / 0.25)).sum()
        assert result.value == pytest.approx(value, abs=1e-13)


def test_sinkhorn_by_all_of_pots_names():
    losses = ot.sinkhorn2(A, np.stack([B, B[::-1], B], 1), M, REG)
    assert losses.shape == (3,) and losses[0] == losses[2] != losses[1]
    assert losses[0] == pytest.approx(POT["linear"], abs=1e-8)
    for method in ("sinkhorn_log", "sinkhorn_stabilized", "greenkhorn"):
        plan, log = ot.sinkhorn(A, B, M, REG, method, log=True)
        scaled = log["u"][:, None] * np.exp(-M / REG) * log["v"]
        np.testing.assert_allclose(plan, scaled, rtol=1e-10)
    assert (ot.sinkhorn([], [], M, REG) == ot.sinkhorn(ot.unif(4), ot.unif(5), M, REG)).all()
    with pytest.raises(ValueError, match="method is 'bogus'"):
        ot.sinkhorn(A, B, M, REG, "bogus")
    with pytest.warns(RuntimeWarning, match="not converged"):
        ot.sinkhorn(
            *(ot.unif(20),) * 2, np.random.default_rng(0).random((20, 20)), 1e-3, numItermax=3
        )


def test_batches_and_lists():
    batch = ot.solve(np.stack([M, 2 * M]), A, B, [REG, 2 * REG])
    assert batch.plan.shape == (2, 4, 5) and batch.value.shape == (2,)
    assert batch.value[1] == pytest.approx(2 * batch.value[0], abs=1e-12)
    mixed = ot.solve([M, M[:3]], [A, None], [B, None], REG)
    assert [r.plan.shape for r in mixed] == [(4, 5), (3, 5)]
    assert mixed[0].value == pytest.approx(batch.value[0], abs=1e-12)
    warm = ot.solve(M, A, B, REG, potentials_init=mixed[0].potentials)
    assert warm.log["niter"] <= 1


def test_gradients_of_results():
    given = [torch.from_numpy(x).clone().requires_grad_() for x in (M, np.log(A), np.log(B))]

    def outputs(cost, x, y):
        result = ot.solve(cost, x.softmax(0), y.softmax(0), REG, tol=1e-13)
        return result.value, result.value_linear, result.potential_a

    assert torch.autograd.gradcheck(outputs, given, atol=1e-6, rtol=1e-4)
    points = [torch.from_numpy(rng.random((4, 2))).requires_grad_() for _ in range(2)]
    for metric in ("sqeuclidean", "euclidean", "cityblock"):
        assert torch.autograd.gradcheck(
            lambda x, y, m=metric: ot.solve_sample(x, y, metric=m, reg=REG, tol=1e-13).value_linear,
            points,
            atol=1e-6,
            rtol=1e-4,
        )


def test_samples():
    result = ot.solve_sample(X[:, None], Y[:, None], A, B, reg=REG)
    assert result.value == pytest.approx(POT_SAMPLES["value"], abs=1e-9)  # POT stops at 1e-9
    assert result.value_linear == pytest.approx(POT_SAMPLES["value_linear"], abs=1e-8)
    assert ot.solve_sample(X, Y, A, B, reg=REG).value == result.value
    x, y = rng.random((3, 6, 2)), rng.random((3, 7, 2))
    batch = ot.solve_sample(x, y, reg=REG)
    each = ot.solve_sample(list(x), list(y), reg=REG)
    np.testing.assert_allclose(batch.value, [r.value for r in each], rtol=1e-13)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_metrics(kind):
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    d = x[:, None] - y
    want = {
        "sqeuclidean": (d**2).sum(-1),
        "euclidean": np.sqrt((d**2).sum(-1)),
        "cityblock": abs(d).sum(-1),
        "cosine": 1 - x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1),
    }
    for metric, expected in want.items():
        np.testing.assert_allclose(ot.dist(kind(x), kind(y), metric), expected, rtol=1e-12)
    assert ot.dist(kind(x)).shape == (5, 5)
    own = ot.dist(kind(x), kind(y), lambda p, q: p[:, :1] - q[:, 0])
    np.testing.assert_allclose(own, x[:, :1] - y[:, 0])
    with pytest.raises(ValueError, match="metric is 'far'"):
        ot.dist(x, y, "far")
    with pytest.raises(ValueError, match="3 and 2 coordinates"):
        ot.dist(x, y[:, :2])


def test_divergence_and_geomlosss_loss():
    x = torch.from_numpy(rng.normal(size=(30, 2)))
    y = x + torch.tensor([3.0, 0])
    # A shifted cloud: the entropic bias is the same in all three terms, so the answer is exact.
    assert float(ot.sinkhorn_divergence(x, y, reg=0.5)) == pytest.approx(9, abs=1e-8)
    assert float(ot.SamplesLoss(p=2, blur=0.5)(x, y)) == pytest.approx(4.5, abs=1e-8)
    assert abs(float(ot.sinkhorn_divergence(x, x, reg=0.5))) <= 1e-12
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)
    loss = ot.SamplesLoss("sinkhorn", p=1, blur=0.1, scaling=0.9)
    assert float(loss(weights, x, weights, y)) == float(loss(x, y)) > 0
    biased = ot.SamplesLoss(p=1, blur=0.1, debias=False)(x, y)
    assert float(biased) == pytest.approx(
        float(ot.solve_sample(x, y, metric="euclidean", reg=0.1).value)
    )
    batch = loss(torch.stack([x, y]), torch.stack([y, y]))
    assert batch.shape == (2,) and abs(float(batch[1])) <= 1e-12
    x.requires_grad_()
    ot.SamplesLoss(p=2, blur=0.5)(x, y).backward()
    np.testing.assert_allclose(x.grad.sum(0), [-3, 0], atol=1e-7)
    for wrong in ({"loss": "energy"}, {"p": 3}):
        with pytest.raises(ValueError):
            ot.SamplesLoss(**wrong)
    with pytest.raises(TypeError, match="got 3 arrays"):
        loss(x, y, x)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_distances_on_a_line(kind):
    x, y, a, b = (kind(each) for each in (X, Y, A, B))
    assert float(ot.wasserstein_1d(x, y, a, b, p=2)) == pytest.approx(POT_SQUARES, abs=1e-14)
    grid = np.sort(np.concatenate([X, Y]))
    below = [((v[:, None] <= grid) * w[:, None]).sum(0) for v, w in ((X, A), (Y, B))]
    area = (abs(below[0] - below[1])[:-1] * np.diff(grid)).sum()
    assert float(ot.wasserstein_1d(x, y, a, b)) == pytest.approx(area, abs=1e-14)
    assert float(ot.wasserstein_1d(x, x + 2, p=3)) == pytest.approx(8)
    h = kind(np.array([0.5, 0.25, 0.25, 0])), kind(np.array([0, 0.5, 0.25, 0.25]))
    assert float(ot.wasserstein(*h)) == pytest.approx(1)
    assert float(ot.wasserstein(*h, p=2)) == pytest.approx(1)
    bins = np.arange(4.0)
    cost = kind((bins[:, None] - bins) ** 2)
    assert float(ot.wasserstein(*h, cost, 0.01, p=2)) == pytest.approx(1, abs=1e-3)


def test_gradients_on_a_line():
    x, y = (torch.from_numpy(each).clone().requires_grad_() for each in (X, Y))
    weights = torch.from_numpy(np.log(A)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y, w: ot.wasserstein_1d(x, y, w.softmax(0), p=2), (x, y, weights)
    )


BAD = [
    (lambda: ot.solve(M), "reg is None, which in POT asks for exact transport"),
    (lambda: ot.solve(M, reg=0), "reg is 0"),
    (lambda: ot.solve(M, reg=0.1, reg_type="L2"), "reg_type is 'L2'"),
    (lambda: ot.solve([M, M], [A], reg=0.1), "a has 1 entries"),
    (lambda: ot.solve(M, B, A, 0.1), "expected shape"),
    (lambda: ot.solve_sample([X], [Y, Y], reg=0.1), "X_a has 1 entries, X_b has 2"),
    (lambda: ot.wasserstein_1d(X, Y, p=0.5), "p is 0.5"),
    (lambda: ot.wasserstein_1d(M, Y), "expected vectors"),
    (lambda: ot.wasserstein_1d(X, Y, A, A), "v_weights have shape"),
    (lambda: ot.wasserstein_1d(X, Y, A, 2 * B), "u_weights sum to 1 and v_weights to 2"),
    (lambda: ot.wasserstein(A, A, reg=0.1), "reg needs M"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
