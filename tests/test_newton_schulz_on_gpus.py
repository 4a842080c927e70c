"""Newton–Schulz on one fake GPU and on several: device, stream, memory, and what is refused.

FUSEDOPT_FAKE_GPU says whether there are any, see where.py. test_newton_schulz.py has the numbers.
"""

import numpy as np
import pytest
import torch

import fusedopt
from cuda_host import fake_gpu
from device_array import DeviceArray
from fusedopt import reference
from newton_schulz_cases import error, gauss

pytestmark = [pytest.mark.fake_gpu, pytest.mark.device_numbers]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_DEVICES", "2")
    fake_gpu.set_stream(1, 0x2000)
    fake_gpu.take_launches()
    yield
    fake_gpu.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_batches_of_any_shape_and_layout(method, dtype):
    for g in (
        torch.from_numpy(gauss(2, 3, 9, 20)),
        torch.from_numpy(gauss(20, 9, 3)).permute(2, 0, 1),
        torch.from_numpy(gauss(12, 12)),
        torch.from_numpy(gauss(1, 7)).expand(5, -1),
    ):
        x = g.to(dtype)
        before = x.clone()
        got = fusedopt.newton_schulz(x, method=method)
        assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
        assert torch.equal(x, before)
        want = reference.newton_schulz(x.double().numpy())
        assert error(got.double().numpy(), want) <= (0.1 if x.element_size() == 2 else 1e-4)


def test_empty_batches():
    fake_gpu.take_launches()
    for shape in [(0, 4), (4, 0), (0, 3, 4), (2, 0, 0)]:
        assert fusedopt.newton_schulz(torch.zeros(shape)).shape == shape
    assert fake_gpu.take_launches() == []


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("stream", [None, 0x3000])
def test_device_and_stream(stream, monkeypatch):
    """The result and the workspace come from the CPU's memory here, so all of it is placed."""
    g = fake_gpu.place(torch.from_numpy(gauss(9, 20)), 1)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fake_gpu.place(empty(*a, **k), 1))
    fusedopt.newton_schulz(g, stream=stream)
    launched = {(device, told) for _, device, told in fake_gpu.take_launches()}
    assert launched == {(1, 0x2000 if stream is None else stream)}
    assert fake_gpu.current_device() == 0


def test_a_failed_launch_is_an_error_that_says_where(monkeypatch):
    fake_gpu.take_launches()
    monkeypatch.setenv("CUDA_HOST_FAIL", "3")
    with pytest.raises(RuntimeError, match=r"cuda:0 .*failed: no kernel image"):
        fusedopt.newton_schulz(torch.ones(9, 12))


def test_what_is_refused():
    for array, options in [
        (DeviceArray(np.ones((3, 4), np.float32)), {}),
        (np.ones((3, 4), np.float32), {"backend": "cuda"}),
    ]:
        with pytest.raises(TypeError, match="but backend 'cuda' takes tensors of torch on a GPU"):
            fusedopt.newton_schulz(array, **options)
    with (
        fake_gpu.on_host(),
        pytest.raises(ValueError, match=r"G \(shape \(3, 4\), .*\): expected an array on a GPU"),
    ):
        fusedopt.newton_schulz(torch.ones(3, 4), backend="cuda")
    with pytest.raises(ValueError, match=r"G .*expected an array on the CPU"):
        fusedopt.newton_schulz(torch.ones(3, 4), backend="cpu")
    with pytest.raises(ValueError, match="stream is -1"):
        fusedopt.newton_schulz(torch.ones(3, 4), stream=-1)


def test_supports():
    for dtype in DTYPES:
        assert fusedopt.supports("newton_schulz", dtypes=[dtype], device="cuda") == (True, "")
