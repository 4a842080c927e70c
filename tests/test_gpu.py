"""What only a real GPU can show: streams, graphs, devices, and that nothing waits for them."""

import contextlib

import pytest
import torch

import fusedopt
import where
from fusedopt.optim import AdamW, BlockwiseAdam, NorMuon
from fusedopt.partitions import Contiguous
from optim_helpers import (
    Race,
    draw,
    parameters,
    params_of,
    run_alone,
    set_grads,
    snapshot,
    states_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(where.FAKE), reason="needs a real GPU")]
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(67,), (4, 5), (1,), (0,), (4097,), (300, 301)]
F32 = torch.float32
SLEEP = 200_000_000  # cycles: about a tenth of a second


@pytest.fixture(autouse=True)
def on_the_gpu():
    where.device = "cuda"
    yield
    torch.cuda.synchronize()
    where.device = "cpu"


@contextlib.contextmanager
def nothing_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def every_dtype(**kwargs):
    groups = [{"params": parameters(*SHAPES, dtype=dtype)} for dtype in DTYPES]
    return AdamW(groups, **OPTIONS, **kwargs)


def blocks_of_every_sort(**kwargs):
    """In one pass and in two, columns, over several tensors, and of one element."""
    groups = [
        {"params": parameters(*shapes, dtype=dtype), "partition": kind}
        for dtype in DTYPES
        for kind, shapes in BLOCKS.items()
    ]
    return BlockwiseAdam(groups, **OPTIONS, **kwargs)


BLOCKS = {
    "row": [(4, 5), (9, 768), (3, 9001)],
    "column": [(70, 33)],
    "tensor": [(300, 301), (67,)],
    "global": [(31,), (5, 67)],
    "coordinate": [(4097,)],
    Contiguous(7): [(2001,)],
}
EVERY = {"AdamW": every_dtype, "BlockwiseAdam": blocks_of_every_sort}


def as_numbers(optimizer):
    """Parameters and states on the CPU; a NaN's bits may differ."""
    tensors = []
    for p, state in zip(params_of(optimizer), states_of(optimizer), strict=True):
        tensors += [p.detach().cpu(), *(x.cpu() for x in state.values())]
    return tensors


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"fused": True}])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_training_has_the_bits_of_the_cpu(options, state_dtype):
    ours = as_numbers(run_alone(every_dtype(state_dtype=state_dtype, **options), 5))
    where.device = "cpu"
    theirs = as_numbers(run_alone(every_dtype(state_dtype=state_dtype, **options), 5))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_blocks_train_as_on_the_cpu(state_dtype):
    """A block's sum has another order there: a second moment may round to its neighbour."""
    ours = as_numbers(run_alone(blocks_of_every_sort(state_dtype=state_dtype), 5))
    where.device = "cpu"
    theirs = as_numbers(run_alone(blocks_of_every_sort(state_dtype=state_dtype), 5))
    for a, b in zip(ours, theirs, strict=True):
        rounding = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(a, b, rtol=4 * rounding, atol=rounding)


@pytest.mark.parametrize("kwargs", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_agrees_with_torch(kwargs):
    Race(AdamW, lambda: parameters(*SHAPES), **OPTIONS, **kwargs).run(10).check()


def test_where_counters_are():
    """Where torch has them: state_dicts load both ways."""
    for kwargs, device in [({}, "cpu"), ({"capturable": True}, "cuda"), ({"fused": True}, "cuda")]:
        for cls in (AdamW, torch.optim.AdamW):
            optimizer = run_alone(cls(parameters((5,)), **kwargs), 1)
            assert states_of(optimizer)[0]["step"].device.type == device


@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_waits_for_blocks(capturable):
    optimizer = run_alone(blocks_of_every_sort(capturable=capturable), 1)
    with nothing_waits():
        optimizer.step()


@pytest.mark.parametrize("kwargs", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_nothing_waits_for_the_device(kwargs):
    optimizer = run_alone(every_dtype(**kwargs), 1)
    if kwargs:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.01, device="cuda")
    if kwargs.get("fused"):
        optimizer.grad_scale = torch.tensor(8.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
    with nothing_waits():
        optimizer.step()


def test_functional_step_waits_for_nothing():
    p, g, m, v = ([torch.ones(1000, device="cuda")] for _ in range(4))
    number = {"device": "cuda", "dtype": torch.float32}
    names = ("lr", "weight_decay", "grad_scale", "found_inf")
    numbers = {name: torch.tensor(0.0 if name == "found_inf" else 0.5, **number) for name in names}
    counter = torch.tensor(0.0, **number)
    with nothing_waits():
        fusedopt.adamw_step(p, g, m, v, step=counter, **numbers)
        fusedopt.adamw_step(p, g, m, v, step=2)
    assert counter.item() == 1


@pytest.mark.parametrize("explicit", [False, True])
def test_the_current_stream_is_taken(explicit):
    """The gradient is written late on another stream: who does not wait for it there is early."""
    stream = torch.cuda.Stream()
    p, g, m, v = (torch.zeros(1 << 16, device="cuda") for _ in range(4))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        g.fill_(1.0)
        if not explicit:
            fusedopt.adamw_step([p], [g], [m], [v], step=1)
    if explicit:
        fusedopt.adamw_step([p], [g], [m], [v], step=1, stream=stream.cuda_stream)
    torch.cuda.synchronize()
    assert bool((m > 0).all())


def captured(optimizer):
    """A CUDA graph of one step, captured after a step that made the states."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("name", EVERY)
def test_graph_replay_has_the_bits_of_eager_steps(name):
    """lr changes between replays, on the device; the counters count there."""
    eager, replayed = (EVERY[name](capturable=True) for _ in range(2))
    rates = [torch.tensor(0.02, device="cuda") for _ in range(2)]
    for optimizer, rate in zip((eager, replayed), rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        set_grads(optimizer, draw(params_of(optimizer), seed=1))
    graph = captured(replayed)
    eager.step()
    for t in range(4):
        grads = draw(params_of(eager), seed=t + 2)
        for rate in rates:
            rate.fill_(0.01 * (t + 1))
        for optimizer in (eager, replayed):
            for p, grad in zip(params_of(optimizer), grads, strict=True):
                p.grad.copy_(grad)
        eager.step()
        graph.replay()
    torch.cuda.synchronize()
    assert snapshot(eager) == snapshot(replayed)
    assert states_of(replayed)[0]["step"].item() == 5


def test_capture_asks_for_capturable():
    optimizer = run_alone(AdamW(parameters((5,))), 1)
    with (
        pytest.raises(RuntimeError, match="capturable is False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    """With fused=True the scaler leaves unscaling and skipping to the kernel."""
    plain, scaled = (AdamW(parameters((33,), (4, 5)), fused=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    for t in range(3):
        grads = draw(params_of(plain), seed=t + 1)
        bad = overflow and t == 1
        set_grads(scaled, [grad * scaler.get_scale() for grad in grads])
        if bad:
            params_of(scaled)[0].grad[3] = float("inf")
        scaler.step(scaled)
        scaler.update()
        if not bad:
            set_grads(plain, grads)
            plain.step()
    assert snapshot(plain) == snapshot(scaled)


def test_found_inf_is_followed_by_counters_that_were_on_the_cpu():
    optimizer = run_alone(AdamW(parameters((33,))), 1)
    before = [x.clone() for x in params_of(optimizer)]
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    with nothing_waits():
        optimizer.step()
    assert states_of(optimizer)[0]["step"].item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, params_of(optimizer), strict=True))


def test_tensors_on_the_cpu_and_the_gpu():
    def train(devices):
        groups = []
        for device in devices:
            where.device = device
            groups.append({"params": parameters((33,), (4, 5))})
        where.device = "cpu"
        optimizer = AdamW(groups)
        for t in range(3):
            grads = draw(params_of(optimizer), seed=t + 1)
            set_grads(
                optimizer,
                [g.to(p.device) for g, p in zip(grads, params_of(optimizer), strict=True)],
            )
            optimizer.step()
        return snapshot(optimizer)

    assert train(["cpu", "cuda"]) == train(["cpu", "cpu"])


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_two_gpus():
    """The current device stays what it was, and each tensor is updated on its own."""
    single = run_alone(every_dtype(), 3)
    double = every_dtype()
    for index, p in enumerate(params_of(double)):
        p.data = p.data.to(f"cuda:{index % 2}")
    for t in range(3):
        grads = draw(params_of(single), seed=t + 1)
        set_grads(double, [g.to(p.device) for g, p in zip(grads, params_of(double), strict=True)])
        double.step()
        assert torch.cuda.current_device() == 0
    assert snapshot(single) == snapshot(double)


def test_more_elements_than_32_bits_count():
    """Elements beyond 2**31 come out as in a small array of the same values."""
    count = 2**31 + 37
    if torch.cuda.mem_get_info()[0] < 9 * count:
        pytest.skip("needs 19 GB of GPU memory")
    values = (1.0, 0.5, 0.25, 0.125)
    large, small = (
        [torch.full((n,), x, dtype=torch.bfloat16, device="cuda") for x in values]
        for n in (count, 64)
    )
    for arrays in (large, small):
        fusedopt.adamw_step(*([x] for x in arrays), step=3, lr=0.1, betas=(0.9, 0.9))
    for a, b in zip(large, small, strict=True):
        assert all(bool((piece == b[0]).all()) for piece in a.split(2**28))


# ---- Muon


def muon(**options):
    """Matrices for NorMuon, and an embedding and a gain for AdamW."""
    groups = [
        {"params": parameters((64, 200), (200, 64), (96, 96), (3, 40, 24)), "partition": "tensor"},
        {"params": parameters((70, 64), (64,), seed=5), "algorithm": "adamw", "lr": 0.01},
    ]
    return NorMuon(groups, lr=0.02, weight_decay=0.1, **options)


def test_muon_is_near_the_cpu():
    """float16's products, and float32's."""
    ours = {dtype: as_numbers(run_alone(muon(ns_dtype=dtype), 3)) for dtype in (None, F32)}
    where.device = "cpu"
    theirs = as_numbers(run_alone(muon(ns_method="standard"), 3))
    for dtype, atol in ((None, 2e-2), (F32, 2e-5)):
        for a, b in zip(ours[dtype], theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_muon_waits_for_nothing():
    optimizer = run_alone(muon(capturable=True), 1)
    for group in optimizer.param_groups:
        for key in {"lr", "momentum", "weight_decay"} & set(group):
            group[key] = torch.tensor(group[key], device="cuda")
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    with nothing_waits():
        optimizer.step()


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_muon_replayed_from_a_graph_has_the_bits_of_eager_steps():
    eager, replayed = (run_alone(muon(capturable=True), 2) for _ in range(2))
    for optimizer in (eager, replayed):
        set_grads(optimizer, draw(params_of(optimizer), seed=9))
    graph = captured(replayed)
    eager.step()
    for _ in range(3):
        graph.replay()
        eager.step()
    torch.cuda.synchronize()
    assert snapshot(eager) == snapshot(replayed)


# ---- Newton–Schulz


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 1000), (512, 512), (12, 65, 33), (2048, 256)], ids=str)
def test_newton_schulz(shape, dtype, method):
    """Waits for nothing, and a graph of it gives the same bits."""
    g = torch.randn(shape, device="cuda").to(dtype)
    want = fusedopt.reference.newton_schulz(g.double().cpu().numpy())
    with nothing_waits():
        got = fusedopt.newton_schulz(g, method=method)
    off = (got.double().cpu() - torch.from_numpy(want)).norm() / torch.from_numpy(want).norm()
    limit = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}
    assert float(off) <= limit[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fusedopt.newton_schulz(g, method=method)
    graph.replay()
    assert torch.equal(replayed, got)
