"""Muon and NorMuon on one fake GPU and on several: the whole step, numbers there, AdamW beside it.

FUSEDOPT_FAKE_GPU says whether there are any, see where.py; test_gpu.py is for real ones.
cuda_host/test_muon.py holds all but the products to the CPU's bits.
"""

import pytest
import torch

import fusedopt
import where
from cuda_host import fake_gpu
from fusedopt.optim import Muon, NorMuon
from fusedopt.partitions import Each, Heads
from fusedopt.steps.muon import row_count
from optim_helpers import draw, parameters, params_of, set_grads, snapshot, threads
from test_muon import check_steps

pytestmark = pytest.mark.fake_gpu
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [(12, 33), (9, 2, 3, 3), (5, 7)]
OPTIONS = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8}
normuon_too = pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    fake_gpu.set_stream(1, 0x2000)
    fake_gpu.take_launches()
    yield
    fake_gpu.forget()


def arrays(normuon, dtype=F32, shapes=SHAPES, seed=0):
    """Parameters, gradients, momentum buffers and, for NorMuon, statistics of rows."""
    rng = torch.Generator().manual_seed(seed)
    roles = [[torch.randn(s, generator=rng).to(dtype) for s in shapes] for _ in range(3)]
    rows = [torch.rand(row_count("tensor", s), generator=rng) for s in shapes]
    return [*roles, rows] if normuon else roles


def copies(roles):
    return [[x.clone() for x in role] for role in roles]


def step(roles, **options):
    function = fusedopt.normuon_step if len(roles) == 4 else fusedopt.muon_step
    function(*roles, **{**OPTIONS, **options})


def equal(ours, theirs):
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.host_counters
@normuon_too
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (F64, F64, F64)], ids=str)
def test_whole_steps_in_full_precision(normuon, dtypes):
    own = {"ns_dtype": None} if dtypes[0] == F64 else {}  # float32 would be what it is told
    check_steps(normuon, dtypes, SHAPES, backend="cuda", steps=2, **own)


@pytest.mark.host_counters
@pytest.mark.parametrize("ns_dtype", [None, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_products_are_those_of_newton_schulz(ns_dtype):
    """By default in float16: with the functional Newton–Schulz in it comes the same step."""
    roles = arrays(False)
    start, grads, buffers = copies(roles)
    step(roles, ns_dtype=ns_dtype, backend="cuda")
    rounded = ns_dtype or torch.float16
    for i, (p, g, m) in enumerate(zip(start, grads, buffers, strict=True)):
        m = m.lerp(g, 0.2)
        torch.testing.assert_close(roles[2][i], m, rtol=1e-6, atol=1e-7)
        u = roles[2][i].lerp(g, 0.2).reshape(len(p), -1)
        o = fusedopt.newton_schulz(u, dtype=rounded, backend="cuda").reshape(p.shape)
        scale = max(1, u.shape[0] / u.shape[1]) ** 0.5
        want = p * (1 - 0.05 * 0.3) - 0.05 * scale * o
        # a last bit of u may fall to another number of half precision
        atol = 1e-6 if rounded == F32 else 0.05 * torch.finfo(rounded).eps
        torch.testing.assert_close(roles[0][i], want, rtol=1e-6, atol=atol)


@pytest.mark.device_numbers
@normuon_too
def test_numbers_on_the_device_give_the_same_bits(normuon):
    roles = arrays(normuon)
    want = copies(roles)
    step(want, grad_scale=8.0)
    told = {**OPTIONS, "grad_scale": 8.0, "found_inf": 0.0}
    there = {name: torch.tensor(value, dtype=F64) for name, value in told.items()}
    step(roles, **there)
    assert equal(roles, want)
    each = arrays(normuon)
    step(each, lr=torch.full((3,), 0.05, dtype=F64), grad_scale=8.0)
    assert equal(each, want)


@pytest.mark.device_numbers
@normuon_too
def test_found_inf_leaves_everything_alone(normuon):
    roles = arrays(normuon)
    before = copies(roles)
    step(roles, found_inf=torch.tensor(1.0))
    assert equal(roles, before)


def mixed(cls=NorMuon, **options):
    """Matrices for Muon, cut or not, and an embedding and a gain for AdamW."""
    matrices = parameters((12, 8), (9, 5), (3, 4, 5))
    kinds = dict(zip(matrices, (Heads(n=3), "tensor", Each("tensor")), strict=True))
    groups = [
        {"params": matrices, "partition": kinds},
        {"params": parameters((7, 6), (9,), seed=5), "algorithm": "adamw", "lr": 0.01},
    ]
    return cls(groups, **{**OPTIONS, **options})


def run(optimizer, steps=2):
    for t in range(steps):
        set_grads(optimizer, draw(params_of(optimizer), t))
        optimizer.step()
    return optimizer


def close(ours, theirs, atol):
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_one_optimizer_runs_both(cls):
    """Against the CPU, in full precision; in float16 by default, which is near."""
    gpu, half = run(mixed(cls, ns_dtype=F32)), run(mixed(cls))
    with fake_gpu.on_host():
        cpu = run(mixed(cls))
    close(gpu, cpu, 2e-6)
    close(half, cpu, 2e-3)
    assert not torch.equal(params_of(half)[0], params_of(cpu)[0])


@pytest.mark.device_numbers
def test_capturable_and_numbers_of_the_groups():
    plain, there = mixed(adamw={"weight_decay": 0.1}), mixed(adamw={"weight_decay": 0.1})
    for group in there.param_groups:
        group["capturable"] = True
        for key in {"lr", "momentum", "weight_decay"} & set(group):
            group[key] = torch.tensor(group[key], dtype=F64)
    for optimizer in (plain, there):
        run(optimizer)
    embedding = params_of(there)[3]
    assert float(there.state[embedding]["step"]) == 2.0
    assert any("prepare" in kernel for kernel, _, _ in fake_gpu.take_launches())
    assert [p for p, _ in snapshot(there)] == [p for p, _ in snapshot(plain)]


@pytest.mark.device_numbers
def test_grad_scale_and_found_inf():
    """What torch.amp.GradScaler sets on optimizers that unscale by themselves."""
    plain, scaled = run(mixed(capturable=True), 1), mixed(capturable=True)
    set_grads(scaled, [g * 1024 for g in draw(params_of(scaled), 0)])
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    scaled.step()
    assert snapshot(scaled) == snapshot(plain)
    scaled.found_inf = torch.tensor(1.0)
    scaled.step()
    assert snapshot(scaled) == snapshot(plain)


@pytest.mark.host_counters
@pytest.mark.usefixtures("two_gpus")
def test_every_device_and_its_stream():
    """Parameters on two GPUs and on the CPU, in one step."""
    places = [0, 1, fake_gpu.HOST]
    params = [torch.nn.Parameter(fake_gpu.place(torch.randn(6, 9), i)) for i in places]
    before = [p.detach().clone() for p in params]
    optimizer = NorMuon(params, **OPTIONS)
    for p, i in zip(params, places, strict=True):
        p.grad = fake_gpu.place(torch.randn(6, 9), i)
        optimizer.state[p] = {
            "momentum_buffer": fake_gpu.place(torch.zeros(6, 9), i),
            "row_sq": fake_gpu.place(torch.zeros(6), i),
        }
    fake_gpu.take_launches()
    optimizer.step()
    launched = {(device, stream) for _, device, stream in fake_gpu.take_launches()}
    assert launched == {(0, fake_gpu.STREAM), (1, 0x2000)}
    assert fake_gpu.current_device() == 0
    assert not any(map(torch.equal, params, before))


def test_explicit_streams_and_backends():
    roles = arrays(False)
    fake_gpu.take_launches()
    step(roles, stream=0x5000)
    assert {stream for _, _, stream in fake_gpu.take_launches()} == {0x5000}
    with pytest.raises(ValueError, match="is on a GPU, but backend 'cpu'"):
        step(roles, backend="cpu")
    with fake_gpu.on_host(), pytest.raises(ValueError, match="is on the CPU, but backend 'cuda'"):
        step(roles, backend="cuda")


def test_empty_and_missing_gradients():
    roles = arrays(False, shapes=[(0, 5), (4, 3), (5, 0)])
    roles[1][1] = None
    before = roles[0][1].clone()
    fake_gpu.take_launches()
    step(roles)
    assert torch.equal(roles[0][1], before)
    assert fake_gpu.take_launches() == []


def test_supports():
    assert fusedopt.supports("muon_step", device="cuda", dtypes=[F32, BF16]) == (True, "")
    assert fusedopt.supports("normuon_step", backend="cuda", device="cuda")[0]
    assert where.FAKE
