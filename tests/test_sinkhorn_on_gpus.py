"""Optimal transport on one fake GPU and on several, and on a real one: the CPU's cases and answers.

FUSEDOPT_FAKE_GPU says whether there are fake ones, see where.py.
"""

import numpy as np
import pytest
import test_sinkhorn_newton_sparse as cases
import torch

import fusedopt
from cuda_host import fake_gpu
from fusedopt import backends

fake = pytest.mark.fake_gpu
once = pytest.mark.device_numbers  # there are no counters here
SMALL = {  # the families, of sizes that a host can run
    "assignment": (cases.random(40, 40), 1 / 1200),
    "wide": (cases.random(23, 60), 1 / 300),
    "tall": (cases.random(60, 23), 1 / 300),
    "easy": (cases.random(40, 33), 0.1),
    "images L1": (cases.images("l1", 7), 1 / 400),
    "images L2": (cases.images("l2", 7), 1 / 400),
    "images squared": (cases.images("sq", 7), 1 / 400),
    "mixture": (cases.mixture(60), 1e-3),
    "cloud": (cases.cloud(50, 3), 1e-3),
    "sharp": (cases.random(40, 40), 1e-4),
    "30 dimensions": (cases.cloud(40, 30), 3e-4),
}


def tensors(*arrays, device="cpu"):
    return [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays]


def solve(cost, a=None, b=None, **options):
    return fusedopt.sinkhorn_newton_sparse(cost, a, b, **options)


def check_family(family, device="cpu"):
    (cost, a, b), reg = SMALL[family]
    result = solve(*tensors(cost, a, b, device=device), reg=reg)
    f, g = result.f.cpu().numpy(), result.g.cpu().numpy()
    assert result.converged and result.marginal_error <= 1e-8
    plan, error = cases.error_of(cost, a, b, f, g, reg)
    assert error <= 1.01e-8 + 4e-16 / reg
    _, _, value, spent = cases.polished(cost, a, b, reg, g)
    assert abs(result.value - value) <= 1e-10
    assert abs(result.cost - spent) <= 1e-7
    assert abs(result.cost - (plan * cost).sum()) <= 1e-13
    assert abs(f @ a - g @ b) <= 1e-13
    np.testing.assert_allclose(result.plan().cpu(), plan, rtol=1e-15 / reg, atol=1e-300)


@fake
@once
@cases.needs_long
@pytest.mark.parametrize("family", SMALL)
def test_families_against_truth(family):
    check_family(family)


@pytest.mark.gpu
@cases.needs_long
@pytest.mark.parametrize("family", SMALL)
def test_families_on_a_real_gpu(family):
    check_family(family, "cuda")


@fake
@once
@pytest.mark.parametrize("family", ["easy", "images squared"])
def test_over_relaxed_sinkhorn_is_the_cpus(family):
    """Not its bits, for sums have another order, but its way."""
    (cost, a, b), reg = SMALL[family]
    ours = solve(*tensors(cost, a, b), reg=reg, method="sinkhorn", tol=1e-9)
    theirs = solve(cost, a, b, reg=reg, method="sinkhorn", tol=1e-9, backend="cpu")
    assert ours.converged and theirs.converged
    assert abs(ours.iterations - theirs.iterations) <= 10
    np.testing.assert_allclose(ours.value, theirs.value, atol=1e-13)
    assert {step.stage for step in ours.trace} == {"sinkhorn"}


@fake
@once
def test_newton_goes_the_cpus_way():
    (cost, a, b), reg = SMALL["assignment"]
    ours, theirs = solve(*tensors(cost, a, b), reg=reg), solve(cost, a, b, reg=reg, backend="cpu")
    assert [step.stage for step in ours.trace] == [step.stage for step in theirs.trace]
    for x, y in zip(ours.trace, theirs.trace, strict=True):
        assert x.reg == y.reg and x.step == pytest.approx(y.step, rel=0.1)
        assert x.marginal_error == pytest.approx(y.marginal_error, rel=0.5, abs=1e-9)
    assert ours.trace[-1].nnz > 0 and ours.trace[-1].cg_iterations > 0


@fake
@once
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype):
    cost, a, b = (x.to(dtype) for x in tensors(*cases.random(30, 41)))
    expected = solve(cost, a, b, reg=0.01)
    assert expected.converged and expected.f.dtype == torch.float64
    gaps = torch.zeros(40, 100, dtype=dtype)
    gaps[3:33, 5:46] = cost
    for same in (cost.T.contiguous().T, gaps[3:33, 5:46]):
        result = solve(same, a, b, reg=0.01)
        assert torch.equal(result.f, expected.f) and torch.equal(result.g, expected.g)


@fake
@once
def test_forbidden_pairs_and_empty_marginals():
    cost, a, b = cases.random(20, 30)
    cost[np.random.default_rng(1).random(cost.shape) < 0.3] = np.inf
    a[[0, 7]] = b[[3, 29]] = 0
    a, b = a / a.sum(), b / b.sum()
    cost[0] = np.inf
    result = solve(*tensors(cost, a, b), reg=0.01)
    plan = result.plan().numpy()
    assert result.converged
    assert (plan[~np.isfinite(cost)] == 0).all()
    assert (plan[[0, 7]] == 0).all() and (plan[:, [3, 29]] == 0).all()
    assert (result.f[[0, 7]] == -np.inf).all() and (result.g[[3, 29]] == -np.inf).all()
    want = solve(cost, a, b, reg=0.01, backend="cpu")
    np.testing.assert_allclose(result.value, want.value, atol=1e-12)


@fake
@once
def test_batches_have_the_bits_of_single_problems():
    problems = [cases.random(20, 31, seed) for seed in range(5)]
    cost, a, b = tensors(*(np.stack(x) for x in zip(*problems, strict=True)))
    reg = np.geomspace(0.1, 1e-3, 5)
    batch = solve(cost, a, b, reg=reg)
    assert batch.converged.all() and len(set(batch.iterations)) > 1
    for i in range(5):
        single = solve(cost[i], a[i], b[i], reg=reg[i])
        assert torch.equal(batch.f[i], single.f) and torch.equal(batch.g[i], single.g)
        assert (batch.value[i], batch.cost[i]) == (single.value, single.cost)
        assert batch[i].trace == single.trace == batch.trace[i]


@fake
@once
def test_warm_start_and_single_steps():
    (cost, a, b), reg = SMALL["images L2"]
    cost, a, b = tensors(cost, a, b)
    cold = solve(cost, a, b, reg=reg)
    assert solve(cost, a, b, reg=reg, f=cold.f, g=cold.g).iterations <= 1
    assert solve(cost, a, b, reg=reg, f=cold.f).converged
    near = solve(cost, a, b, reg=reg, tol=1e-3)
    newton = fusedopt.sns_newton_step(cost, a, b, reg=reg, g=near.g)
    sinkhorn = fusedopt.sinkhorn_step(cost, a, b, reg=reg, g=near.g)
    assert newton.trace[0].stage == "newton" and newton.iterations == sinkhorn.iterations == 1
    assert sinkhorn.trace[0].stage == "sinkhorn"
    assert newton.marginal_error < sinkhorn.marginal_error < near.marginal_error


@fake
@once
def test_what_is_not_solved_says_so():
    (cost, a, b), reg = SMALL["assignment"]
    result = solve(*tensors(cost, a, b), reg=reg, max_iter=4)
    assert not result.converged and result.iterations == len(result.trace) == 4
    infeasible = np.zeros((3, 3))
    infeasible[:2, 1:] = np.inf
    result = solve(*tensors(infeasible), reg=0.1, max_iter=60)
    assert not result.converged and result.marginal_error > 0.1


@fake
@once
def test_gradients():
    rng = torch.Generator().manual_seed(0)
    cost = torch.rand(4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    x = torch.randn(4, generator=rng, dtype=torch.float64).requires_grad_()

    def value(cost, x):
        return solve(cost, torch.softmax(x, -1), reg=0.1, tol=1e-12).value

    assert torch.autograd.gradcheck(value, (cost, x), atol=1e-7, rtol=1e-5)


ON_A_GPU = [
    (change, kind, message)
    for change, kind, message in cases.BAD
    if getattr(change.get("cost", np.zeros(1)), "dtype", None) == np.float64
    and "backend" not in change
]


@fake
@once
@pytest.mark.parametrize(("change", "kind", "message"), ON_A_GPU)
def test_errors(change, kind, message):
    """Those that only the cost's values show come after the launch, and are the same."""
    arguments = {"cost": np.arange(6.0).reshape(2, 3), "reg": 0.1} | change
    [cost] = tensors(arguments.pop("cost"))
    with pytest.raises(kind, match=message):
        solve(cost, **arguments)


@fake
@once
def test_device_and_stream(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    fake_gpu.set_stream(1, 0x2000)
    [cost] = tensors(cases.random(5, 6)[0])
    fake_gpu.take_launches()
    solve(cost, reg=0.1)
    [(kernel, device, stream)] = fake_gpu.take_launches()
    assert "transport_kernel" in kernel and (device, stream) == (0, fake_gpu.STREAM)
    monkeypatch.setenv("CUDA_HOST_FAIL", "1")
    with pytest.raises(RuntimeError, match=r"the launch on cuda:0 \(sm_90\) failed: no kernel"):
        solve(cost, reg=0.1)


@fake
@once
def test_the_cost_lies_where_the_backend_is():
    cost = np.zeros((2, 2))
    with pytest.raises(ValueError, match="cost is on the CPU, but backend 'cuda'"):
        solve(cost, reg=0.1, backend="cuda")
    with pytest.raises(ValueError, match="cost is on a GPU, but backend 'cpu'"):
        solve(torch.from_numpy(cost), reg=0.1, backend="cpu")
    assert backends.supports("sinkhorn_newton_sparse", "cuda", ["float32"], "cuda") == (True, "")


# ---- tiny matrices


@fake
@once
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (7, 3), (8, 8)])
def test_sinkhorn_knopp(size):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *size, generator=rng, dtype=torch.float64)
    got = fusedopt.sinkhorn_knopp(logits, iterations=7)
    want = fusedopt.sinkhorn_knopp(logits, iterations=7, backend="reference")
    assert got.shape == logits.shape and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    single = fusedopt.sinkhorn_knopp(logits.float(), iterations=7)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: fusedopt.sinkhorn_knopp(x, iterations=4), logits, fast_mode=True
    )
    assert fusedopt.sinkhorn_knopp(logits[:, :0].float()).shape == (2, 0, *size)


@fake
@once
def test_sinkhorn_knopp_refuses():
    with pytest.raises(ValueError, match="n and m at most 8"):
        fusedopt.sinkhorn_knopp(torch.zeros(3, 9, 4))
    with pytest.raises(ValueError, match="logits is on a GPU, but backend 'cpu'"):
        fusedopt.sinkhorn_knopp(torch.zeros(3, 4, 4), backend="cpu")


@pytest.mark.gpu
def test_sinkhorn_knopp_on_a_real_gpu():
    logits = torch.randn(1000, 4, 4, dtype=torch.float64)
    want = fusedopt.sinkhorn_knopp(logits, backend="reference")
    there = logits.cuda().requires_grad_()
    torch.testing.assert_close(fusedopt.sinkhorn_knopp(there).cpu(), want)
    assert torch.autograd.gradcheck(
        fusedopt.sinkhorn_knopp, there[:5].detach().requires_grad_(), fast_mode=True
    )
