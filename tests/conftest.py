"""Puts the tests on a device (see where.py), and says which were left out for want of one."""

import contextlib
import os

import pytest

import where
from cuda_host import fake_gpu

if where.FAKE:
    fake_gpu.install(None if where.FAKE == "plain" else where.FAKE)
    from fusedopt import backends

    backends.GPU_DEFAULT.clear()  # Triton has no such GPU

from fusedopt import _C  # after the fake GPU has taken its place

# Muon and Newton–Schulz are held to float32's accuracy; products of bfloat16 have their own file.
if _C.isa() == "avx512_bf16":
    _C.set_isa("avx512")


@pytest.fixture
def one_thread():
    """torch's threads meet after every operation of its loop, for 15 ms on a busy machine."""
    from optim_helpers import threads

    with threads(1):
        yield


COUNTERS = ["counters on the GPU", "counters on the CPU"]
MARKS = dict(zip(("device_numbers", "host_counters"), COUNTERS, strict=True))


@pytest.fixture(scope="module", params=where.DEVICES)
def device(request):
    """The device of the test's tensors: this process' own; a real GPU under the marker gpu."""
    where.device = request.param
    yield request.param
    where.device = "cpu"


if where.FAKE:

    @pytest.fixture(autouse=True, params=COUNTERS)
    def counters(request):
        """Where 0-d tensors lie, and so torch's step counters: both ways are possible."""
        with fake_gpu.host_scalars() if request.param == COUNTERS[1] else contextlib.nullcontext():
            yield


def has_other_counters(item):
    """Whether a test is about 0-d tensors elsewhere than they are in this run of it."""
    where_they_are = getattr(item, "callspec", None) and item.callspec.params.get("counters")
    wanted = [place for mark, place in MARKS.items() if item.get_closest_marker(mark)]
    return where_they_are and wanted and where_they_are not in wanted


def gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def pytest_collection_modifyitems(config, items):
    other = [item for item in items if item.get_closest_marker("fake_gpu") and not where.FAKE]
    other += [item for item in items if has_other_counters(item)]
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
