"""Blockwise Adam on one fake GPU and on several: device and stream, numbers there, shared blocks.

FUSEDOPT_FAKE_GPU says whether there are any, see where.py. test_blockwise_adam.py has the numbers.
"""

import pytest
import torch

import fusedopt
from cuda_host import fake_gpu
from fusedopt.optim import BlockwiseAdam
from fusedopt.partitions import Contiguous, block_count

pytestmark = pytest.mark.fake_gpu
KINDS = ["coordinate", "row", "column", "tensor", "global", Contiguous(7)]
SHAPES = [(6, 35), (48, 67), (1, 9), (0,), (300, 70)]
OPTIONS = {"lr": 0.03, "weight_decay": 0.25}


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    fake_gpu.set_stream(1, 0x2000)
    fake_gpu.take_launches()
    yield
    fake_gpu.forget()


def some_arrays(kind, seed=0):
    rng = torch.Generator().manual_seed(seed)
    p, g, m = ([torch.randn(shape, generator=rng) for shape in SHAPES] for _ in range(3))
    return [p, g, m, [torch.full((block_count(kind, shape),), 0.5) for shape in SHAPES]]


def copies(arrays):
    return [[x.clone() for x in role] for role in arrays]


def equal(ours, theirs):
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.device_numbers
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_numbers_on_the_device_give_the_same_bits(kind):
    arrays = some_arrays(kind)
    want = copies(arrays)
    fusedopt.blockwise_adam_step(*want, partitions=kind, step=7, grad_scale=24.0, **OPTIONS)
    told = {"lr": 0.03, "weight_decay": 0.25, "grad_scale": 24.0, "found_inf": 0.0}
    there = {name: torch.tensor(value, dtype=torch.float64) for name, value in told.items()}
    counter = torch.tensor(6.0)
    fusedopt.blockwise_adam_step(*arrays, partitions=kind, step=counter, **there)
    assert equal(arrays, want)
    assert float(counter) == 7.0


@pytest.mark.device_numbers
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_found_inf_leaves_everything_alone(kind):
    arrays, counter = some_arrays(kind), torch.tensor(6.0)
    arrays[1][1] = None
    before = copies([arrays[0], arrays[2], arrays[3]])
    fusedopt.blockwise_adam_step(
        *arrays, partitions=kind, step=counter, found_inf=torch.tensor(1.0), **OPTIONS
    )
    assert equal([arrays[0], arrays[2], arrays[3]], before)
    assert float(counter) == 6.0


@pytest.mark.device_numbers
@pytest.mark.parametrize("capturable", [False, True])
def test_a_global_block_is_the_same_in_tensors_without_gradient(capturable):
    arrays = some_arrays("global")
    arrays[1][1] = None
    untouched = arrays[0][1].clone()
    step = torch.tensor(3.0) if capturable else 4
    fusedopt.blockwise_adam_step(*arrays, partitions="global", step=step, **OPTIONS)
    values = {float(v) for v in arrays[3]}
    assert len(values) == 1 and values != {0.5}
    assert torch.equal(arrays[0][1], untouched)


@pytest.mark.usefixtures("two_gpus")
def test_every_device_and_its_stream():
    params = [torch.nn.Parameter(fake_gpu.place(torch.randn(40, 70), i % 2)) for i in range(4)]
    optimizer = BlockwiseAdam(params, partition="row")
    for i, p in enumerate(params):
        p.grad = fake_gpu.place(torch.randn(40, 70), i % 2)
        optimizer.state[p] = {
            "step": fake_gpu.place(torch.zeros(()), fake_gpu.HOST),
            "exp_avg": fake_gpu.place(torch.zeros(40, 70), i % 2),
            "block_sq": fake_gpu.place(torch.zeros(40), i % 2),
        }
    fake_gpu.take_launches()
    optimizer.step()
    launched = {(device, stream) for _, device, stream in fake_gpu.take_launches()}
    assert launched == {(0, fake_gpu.STREAM), (1, 0x2000)}
    assert fake_gpu.current_device() == 0


@pytest.mark.usefixtures("two_gpus")
def test_a_global_block_lies_on_one_device():
    arrays = some_arrays("global")
    for role in arrays:
        fake_gpu.place(role[1], 1)
    with pytest.raises(ValueError, match=r"another tensor of the same 'global' block on cuda:0"):
        fusedopt.blockwise_adam_step(*arrays, partitions="global", step=1, **OPTIONS)


@pytest.mark.device_numbers
def test_capturable_counts_on_the_device():
    p = torch.nn.Parameter(torch.randn(5, 7))
    optimizer = BlockwiseAdam([p], capturable=True)
    for t in range(1, 4):
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == t
    assert any("prepare" in kernel for kernel, _, _ in fake_gpu.take_launches())
