"""AdamW on one fake GPU and on several: the CPU's bits, device and stream, nothing that waits.

FUSEDOPT_FAKE_GPU says whether there are any, see where.py; test_gpu.py is for real ones.
"""

import ast
import contextlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import fusedopt
import where
from cuda_host import fake_gpu
from device_array import DeviceArray
from fusedopt import _C, backends
from fusedopt.optim import AdamW
from optim_helpers import DTYPES, draw, parameters, params_of, set_grads, snapshot

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
SHAPES = [(67,), (4, 5), (1,), (0,), (4097,)]

fake = pytest.mark.fake_gpu
needs_fma = pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU has no fma")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    fake_gpu.set_stream(1, 0x2000)
    fake_gpu.take_launches()
    yield
    fake_gpu.forget()


def some_arrays(seed=0, count=6):
    rng = torch.Generator().manual_seed(seed)
    sizes = [1 + 37 * i for i in range(count)]
    p, g, m = ([torch.randn(n, generator=rng) for n in sizes] for _ in range(3))
    return [p, g, m, [torch.rand(n, generator=rng) for n in sizes]]


def copies(arrays):
    return [[x.clone() for x in role] for role in arrays]


def equal(ours, theirs):
    return all(
        torch.equal(a, b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def on_the_cpu(arrays, **options):
    """What the CPU backend makes of copies of them."""
    result = copies(arrays)
    with fake_gpu.on_host():
        fusedopt.adamw_step(*result, backend="cpu", **options)
    return result


# ---- the CPU's bits, wherever the numbers lie


@fake
@needs_fma
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"fused": True}])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_training_has_the_bits_of_the_cpu(options, state_dtype):
    def train():
        groups = [{"params": parameters(*SHAPES, dtype=dtype)} for dtype in DTYPES]
        groups[1]["lr"] = 0.1
        optimizer = AdamW(groups, state_dtype=state_dtype, **OPTIONS, **options)
        for t in range(5):
            grads = draw(params_of(optimizer), seed=t + 1)
            set_grads(optimizer, [None if (i + t) % 4 == 0 else g for i, g in enumerate(grads)])
            optimizer.step()
        return snapshot(optimizer)

    ours = train()
    with fake_gpu.on_host():
        assert ours == train()


NUMBERS = {  # what may lie on the device, and what the CPU is told instead
    "lr": ({"lr": torch.tensor(0.03)}, {"lr": float(np.float32(0.03))}),
    "lr of each": (
        {"lr": [torch.tensor(0.01 * i, dtype=torch.float64) for i in range(6)]},
        {"lr": [0.01 * i for i in range(6)]},
    ),
    "lr in one array": (
        {"lr": torch.tensor([0.01 * i for i in range(6)], dtype=torch.float64)},
        {"lr": [0.01 * i for i in range(6)]},
    ),
    "weight_decay": ({"weight_decay": torch.tensor(0.25)}, {"weight_decay": 0.25}),
    "weight_decay of each": (
        {"weight_decay": [torch.tensor(0.125 * i) for i in range(6)]},
        {"weight_decay": [0.125 * i for i in range(6)]},
    ),
    "grad_scale": ({"grad_scale": torch.tensor(24.0)}, {"grad_scale": 24.0}),
    "found_inf of 0": ({"found_inf": torch.tensor(0.0)}, {}),
    "all": (
        {
            "lr": torch.tensor(0.5),
            "weight_decay": torch.tensor(0.25),
            "grad_scale": torch.tensor(24.0),
            "found_inf": torch.tensor(0.0),
        },
        {"lr": 0.5, "weight_decay": 0.25, "grad_scale": 24.0},
    ),
}


@fake
@needs_fma
@pytest.mark.parametrize("counted", ["step", "one counter", "counters", "counters of ints"])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_on_the_device(case, counted):
    """Every number that may lie on the device, with the step known on the host or counted there."""
    ours, told = NUMBERS[case]
    step = {
        "step": 7,
        "one counter": torch.tensor(6.0),
        "counters": torch.tensor([6.0] * 6, dtype=torch.float64),
        "counters of ints": [torch.tensor([6]) for _ in range(6)],
    }[counted]
    arrays = some_arrays()
    want = on_the_cpu(arrays, step=7, **told)
    fusedopt.adamw_step(*arrays, step=step, **ours)
    assert equal(arrays, want)
    if not isinstance(step, int):
        assert {float(x) for x in ([step] if counted == "one counter" else step)} == {7.0}


MANY = 2100
EACH = np.arange(1, MANY + 1)


def on_the_device(values):
    return [torch.tensor(float(x), dtype=torch.float64) for x in values]


# What tensors have of their own, where, and launches beside one for every 700 tensors.
RATES, DECAYS, STEPS = list(1e-5 * EACH), list(1e-4 * EACH), on_the_device(6.0 * EACH)
OWN_NUMBERS = {
    "lr": ({"lr": RATES}, 0),
    "lr and decay": ({"lr": RATES, "weight_decay": DECAYS}, 0),
    "counter": ({"step": STEPS}, 1),
    "counter and lr": ({"step": STEPS, "lr": RATES}, 2),
    "lr on the device": ({"lr": on_the_device(RATES)}, 2),
    "all on the device": (
        {"step": STEPS, "lr": on_the_device(RATES), "weight_decay": on_the_device(DECAYS)},
        2,
    ),
}


@fake
@needs_fma
@pytest.mark.device_numbers
@pytest.mark.parametrize("case", OWN_NUMBERS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_numbers_of_each_of_many_tensors(case, amsgrad):
    """In the CPU's bits, and in few launches: one for every 700 tensors, and few for numbers."""
    numbers, more = OWN_NUMBERS[case]
    rng = torch.Generator().manual_seed(0)
    arrays = [[torch.rand(2, generator=rng) for _ in EACH] for _ in range(4 + amsgrad)]

    def step(arrays, **changes):
        own = {"step": 7, **numbers, **changes}
        if "step" in numbers:
            own["step"] = [x.clone() for x in numbers["step"]]
        maxima = arrays[4] if amsgrad else None
        fusedopt.adamw_step(*arrays[:4], max_exp_avg_sqs=maxima, **own)
        return own["step"]

    want = copies(arrays)
    with fake_gpu.on_host():
        step(want, **{k: RATES if k == "lr" else DECAYS for k in numbers if k != "step"})
    fake_gpu.take_launches()
    counters = step(arrays)
    assert len(fake_gpu.take_launches()) <= MANY // 700 + more
    assert equal(arrays, want)
    assert counters == 7 or [float(x) for x in counters] == list(6.0 * EACH + 1)


@fake
@needs_fma
@pytest.mark.parametrize("capturable", [False, True])
def test_groups_that_differ_in_lr_and_in_something_else(capturable):
    """Each tensor has and brings its own lr: what else differs must not be its neighbour's."""
    others = [{}, {"betas": (0.7, 0.95)}, {"betas": (0.8, 0.9)}, {"eps": 0.1}, {"maximize": True}]

    def train():
        groups = [
            {"params": parameters((5,), seed=i), "lr": 0.01 * (i + 1), **others[i // 4]}
            for i in range(4 * len(others))
        ]
        optimizer = AdamW(groups, **OPTIONS, capturable=capturable)
        for t in range(3):
            set_grads(optimizer, draw(params_of(optimizer), seed=t + 1))
            optimizer.step()
        return snapshot(optimizer)

    ours = train()
    with fake_gpu.on_host():
        assert ours == train()


@fake
@pytest.mark.device_numbers
@pytest.mark.parametrize("counted", [True, False])
def test_found_inf_leaves_everything_alone(counted):
    arrays = some_arrays()
    before = copies(arrays)
    step = torch.tensor(6.0) if counted else 7
    for found_inf in (torch.tensor(1.0), torch.tensor(float("nan")), 1.0):
        fusedopt.adamw_step(*arrays, step=step, found_inf=found_inf)
        assert equal(arrays, before)
        assert not counted or step == 6


@fake
def test_a_counter_on_the_cpu_cannot_follow_found_inf_on_the_gpu():
    arrays = some_arrays()
    before, step = copies(arrays), np.array(3.0)
    with pytest.raises(ValueError, match=r"step\[0\] is on the CPU, but found_inf on a GPU"):
        fusedopt.adamw_step(*arrays, step=step, found_inf=torch.tensor([0.0]))
    assert equal(arrays, before)
    assert step == 3


@fake
@pytest.mark.device_numbers
def test_counters_move_to_the_gpu_for_found_inf(two_gpus):
    """GradScaler hands found_inf to a fused optimizer whose checkpoint had its steps on the CPU."""
    params = parameters((33,), (4, 5))
    optimizer = AdamW(params)
    set_grads(optimizer, draw(params, 1))
    optimizer.step()
    counters = [fake_gpu.place(optimizer.state[p]["step"].clone(), fake_gpu.HOST) for p in params]
    for p, counter in zip(params, counters, strict=True):
        optimizer.state[p]["step"] = counter
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor([1.0])
    moved = [counter.clone() for counter in counters]
    to, copies_of = torch.Tensor.to, {id(c): m for c, m in zip(counters, moved, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        copied = lambda x, *a, **k: copies_of.get(id(x)) if id(x) in copies_of else to(x, *a, **k)  # noqa: E731
        patch.setattr(torch.Tensor, "to", copied)
        optimizer.step()
    assert snapshot(optimizer) == before
    assert all(optimizer.state[p]["step"] is m for p, m in zip(params, moved, strict=True))
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step()
    assert [float(m) for m in moved] == [2.0, 2.0] and [float(c) for c in counters] == [1.0, 1.0]


@contextlib.contextmanager
def reading_refused():
    """Tensors' values can't be brought to Python: on a GPU each such call waits for it."""

    def refuse(*_, **__):
        raise AssertionError("waits for the device")

    names = ("__float__", "__int__", "__bool__", "__index__", "item", "tolist", "cpu", "numpy")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, refuse)
        yield


@fake
@pytest.mark.device_numbers
@pytest.mark.parametrize("capturable", [True, False])
def test_nothing_waits_for_the_device(capturable):
    params = parameters((33,), (4, 5))
    optimizer = AdamW(params, lr=torch.tensor(0.01), capturable=capturable, fused=True)
    set_grads(optimizer, draw(params, 1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    arrays = some_arrays()
    with reading_refused():
        optimizer.step()
        fusedopt.adamw_step(
            *arrays, step=torch.tensor(1.0), lr=torch.tensor(0.1), weight_decay=torch.tensor(0.1),
            grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0),
        )  # fmt: skip


@fake
def test_a_number_on_the_device_is_no_beta():
    with pytest.raises(ValueError, match=r"betas\[1\] is on a GPU"):
        fusedopt.adamw_step(*some_arrays(), step=1, betas=(0.9, torch.tensor([0.9])))


@fake
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": torch.ones(2)}, ValueError, "lr has 2 numbers"),
        (
            {"step": [torch.zeros(1).bfloat16()] * 6},
            TypeError,
            r"step\[0\] .*a step counter is float32",
        ),
        ({"found_inf": torch.zeros(3)}, ValueError, "found_inf .*found_inf has one element"),
        ({"stream": "fast"}, TypeError, "stream is 'fast'"),
        ({"stream": -1}, ValueError, "stream is -1"),
        ({"backend": "cpu"}, ValueError, r"params\[0\] is on a GPU, but backend 'cpu'"),
    ],
)
def test_bad_numbers_are_refused_before_the_first_write(options, error, message):
    arrays = some_arrays()
    before = copies(arrays)
    with pytest.raises(error, match=message):
        fusedopt.adamw_step(*arrays, **{"step": 1, **options})
    assert equal(arrays, before)


@fake
def test_arrays_on_the_cpu_are_refused_by_cuda():
    arrays = some_arrays()
    with fake_gpu.on_host(), pytest.raises(ValueError, match=r"params\[0\] is on the CPU, but"):
        fusedopt.adamw_step(*arrays, step=1, backend="cuda")


# ---- device and stream


@fake
def test_the_current_stream_is_taken():
    fake_gpu.take_launches()
    for stream in (0x77, fake_gpu.STREAM):
        fake_gpu.set_stream(0, stream)
        fusedopt.adamw_step(*some_arrays(), step=1)
        fusedopt.adamw_step(*some_arrays(), step=torch.tensor(1.0))
        params = parameters((5,))
        optimizer = AdamW(params, fused=True)
        set_grads(optimizer, draw(params, 1))
        optimizer.step()
        launches = fake_gpu.take_launches()
        assert len(launches) >= 3 and {(d, s) for _, d, s in launches} == {(0, stream)}


@fake
def test_a_stream_that_is_given_goes_first():
    fake_gpu.take_launches()
    fusedopt.adamw_step(*some_arrays(), step=torch.tensor(1.0), stream=0x99)
    assert {s for _, _, s in fake_gpu.take_launches()} == {0x99}
    fusedopt.adamw_step(*some_arrays(), step=1, stream=0)
    assert {s for _, _, s in fake_gpu.take_launches()} == {0}


@fake
def test_arrays_of_other_libraries():
    """They are told the stream, and asked for one: theirs can't be known."""
    roles = [[DeviceArray(x.numpy()) for x in role] for role in some_arrays()]
    want = on_the_cpu(some_arrays(), step=3)
    fake_gpu.take_launches()
    with pytest.raises(ValueError, match="DeviceArray, which does not tell its current stream"):
        fusedopt.adamw_step(*roles, step=3)
    assert fake_gpu.take_launches() == []
    fusedopt.adamw_step(*roles, step=3, stream=0x55)
    assert {s for _, _, s in fake_gpu.take_launches()} == {0x55}
    assert roles[0][0].streams[-1] == 0x55
    for ours, theirs in zip(roles, want, strict=True):
        assert all((a.array == b.numpy()).all() for a, b in zip(ours, theirs, strict=True))
    fusedopt.adamw_step(*roles, step=3, stream=0)
    assert roles[0][0].streams[-1] == 1  # DLPack's name for CUDA's stream 0


def split(params, devices):
    for p, device in zip(params, devices, strict=True):
        fake_gpu.place(p, device)


@fake
def test_a_list_lies_on_one_device(two_gpus):
    arrays = some_arrays()
    for role in arrays:
        fake_gpu.place(role[3], 1)
    before = copies(arrays)
    with pytest.raises(
        ValueError, match=r"params\[3\] .* is on cuda:1, but params\[0\] is on cuda:0"
    ):
        fusedopt.adamw_step(*arrays, step=1)
    fake_gpu.place(arrays[1][0], 1)
    with pytest.raises(
        ValueError, match=r"grads\[0\] .* is on cuda:1, but params\[0\] is on cuda:0"
    ):
        fusedopt.adamw_step(*arrays, step=1)
    elsewhere = fake_gpu.place(torch.tensor([1.0]), 1)
    fine = [role[1:2] for role in arrays]
    with pytest.raises(
        ValueError, match=r"step\[0\] is on cuda:1, but params\[0\] .* is on cuda:0"
    ):
        fusedopt.adamw_step(*fine, step=[elsewhere])
    with pytest.raises(ValueError, match=r"lr .* is on cuda:1, but the arrays are on cuda:0"):
        fusedopt.adamw_step(*fine, step=1, lr=[elsewhere])
    assert equal(arrays, before)


@fake
def test_the_second_gpu_alone(two_gpus):
    arrays = some_arrays()
    want = on_the_cpu(arrays, step=1)
    for role in arrays:
        for x in role:
            fake_gpu.place(x, 1)
    fusedopt.adamw_step(*arrays, step=1)
    assert equal(arrays, want)
    assert {(d, s) for _, d, s in fake_gpu.take_launches()} == {(1, 0x2000)}
    assert fake_gpu.current_device() == 0  # the one that was current is so again
    fake_gpu.forget()
    fusedopt.adamw_step(*some_arrays(), step=1)
    assert {(d, s) for _, d, s in fake_gpu.take_launches()} == {(0, fake_gpu.STREAM)}


@fake
@needs_fma
@pytest.mark.parametrize("devices", [(0, 1, 0, 1), (fake_gpu.HOST, 0, 1, fake_gpu.HOST)])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"lr": torch.tensor([0.01])}], ids=str)
def test_groups_on_several_devices(two_gpus, devices, options):
    """As torch.optim does with such groups: it works; a launch for each device."""

    def train(place):
        groups = [{"params": parameters((33,), (4, 5), seed=i)} for i in range(4)]
        optimizer = AdamW(groups, **options)
        for t in range(3):
            set_grads(optimizer, draw(params_of(optimizer), seed=t + 1))
            if t == 0:
                optimizer._init_state(optimizer.param_groups[0], params_of(optimizer))
                for p in params_of(optimizer):
                    for key, value in optimizer.state[p].items():
                        optimizer.state[p][key] = value.clone()
            if place:
                for group, device in zip(optimizer.param_groups, devices, strict=True):
                    for p in group["params"]:
                        for tensor in (p, p.grad, *optimizer.state[p].values()):
                            fake_gpu.place(tensor, device)
            optimizer.step()
        return snapshot(optimizer)

    to = torch.Tensor.to

    def copied(tensor, *where_to, **how):
        """tensor.to("cuda:1"), which here makes a copy on the fake one."""
        if where_to and str(where_to[0]).startswith("cuda:"):
            return fake_gpu.place(tensor.clone(), int(str(where_to[0])[5:]))
        return to(tensor, *where_to, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", copied)
        ours = train(True)
    launched = {(d, s) for _, d, s in fake_gpu.take_launches()}
    assert launched == {(0, fake_gpu.STREAM), (1, 0x2000)}
    fake_gpu.forget()
    with fake_gpu.on_host():
        assert ours == train(False)


@fake
def test_overlap_is_looked_for_on_each_device(two_gpus):
    arrays = some_arrays()
    arrays[2][2] = arrays[3][2]
    with pytest.raises(ValueError, match=r"exp_avg.*\[2\].*shares memory with exp_avg.*\[2\]"):
        fusedopt.adamw_step(*arrays, step=1)
    counter = torch.zeros(2)
    with pytest.raises(ValueError, match=r"(step|params).*shares memory with (step|params)\[0\]"):
        fusedopt.adamw_step([counter], *([torch.zeros(2)] for _ in range(3)), step=[counter[:1]])


# ---- what goes wrong


@fake
def test_a_launch_that_fails_says_where(monkeypatch):
    """And what was not launched was not counted."""
    params = parameters((33,))
    optimizer = AdamW(params)
    set_grads(optimizer, draw(params, 1))
    optimizer.step()
    steps = float(optimizer.state[params[0]]["step"])
    fake_gpu.take_launches()
    monkeypatch.setenv("CUDA_HOST_FAIL", "1")
    with pytest.raises(
        RuntimeError, match=r"launch on cuda:0 \(sm_90\) failed: no kernel image.*80-real"
    ):
        optimizer.step()
    assert steps == float(optimizer.state[params[0]]["step"]) == 1.0
    monkeypatch.delenv("CUDA_HOST_FAIL")
    optimizer.step()


@fake
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CUDA_HOST_DEVICES": "0"}, "no CUDA-capable device is detected"),
        ({"CUDA_HOST_ARCH": "75"}, r"no kernels for the devices here \(cuda:0 is sm_75\).*80-real"),
    ],
)
def test_why_cuda_is_missing(monkeypatch, environment, why):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backends, "cuda_devices", _C.cuda_devices)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' is not available: .*{why}"):
        fusedopt.adamw_step(*some_arrays(), step=1)
    assert not fusedopt.supports("adamw_step", device="cuda")[0]


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        ("80-real 90-real", 86, True),
        ("80-real 90-real", 100, False),
        ("80-real 90", 120, True),
        ("90-real", 89, False),
        ("80-real", 75, False),
    ],
)
def test_which_devices_a_build_runs_on(monkeypatch, archs, device, runs):
    monkeypatch.setattr(_C, "cuda_archs", archs)
    assert (backends.why_no_kernel([device]) == "") is runs


@pytest.mark.skipif(bool(where.FAKE), reason="about the installed module")
def test_the_installed_module_says_why_there_is_no_gpu():
    code = "import fusedopt; print(*map(fusedopt.env().get, ('cuda', 'backends')), sep='\\n')"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    cuda, table = map(ast.literal_eval, done.stdout.splitlines())
    assert cuda["devices"] == []
    words = "driver|device" if _C.built_with_cuda else "built without CUDA"
    assert re.search(words, cuda["error"])
    assert table["cuda"] == cuda["error"]
