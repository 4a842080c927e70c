"""Puts the tests on a device (see where.py), and says which were left out for want of one."""

import os

import pytest

import where
from cuda_host import fake_gpu

if where.FAKE:
    fake_gpu.install(None if where.FAKE == "plain" else where.FAKE)


@pytest.fixture
def one_thread():
    """torch's threads meet after every operation of its loop, for 15 ms on a busy machine."""
    from optim_helpers import threads

    with threads(1):
        yield


DEVICES = ["cpu", *([] if where.FAKE else [pytest.param("cuda", marks=pytest.mark.gpu)])]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    """The device of the test's tensors: this process' own; a real GPU under the marker gpu."""
    where.device = request.param
    yield request.param
    where.device = "cpu"


if where.FAKE:

    @pytest.fixture(autouse=True, params=["counters on the GPU", "counters on the CPU"])
    def counters(request):
        """Where 0-d tensors lie, and so torch's step counters: both ways are possible."""
        if request.param == "counters on the CPU":
            if request.node.get_closest_marker("device_numbers"):
                pytest.skip("about 0-d tensors on the GPU")
            with fake_gpu.host_scalars():
                yield
        elif request.node.get_closest_marker("host_counters"):
            pytest.skip("nothing looks at the value of a number on a GPU")
        else:
            yield


def gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def pytest_collection_modifyitems(config, items):
    other = [item for item in items if item.get_closest_marker("fake_gpu") and not where.FAKE]
    impossible = [item for item in items if item.get_closest_marker("gpu") and not gpus()]
    config.stash[LEFT_OUT] = len(impossible)
    left_out = {*other, *impossible}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(LEFT_OUT, 0)
    if count and "PYTEST_XDIST_WORKER" not in os.environ:
        terminalreporter.write_line(f"{count} tests need a GPU, and none is here: left out")
