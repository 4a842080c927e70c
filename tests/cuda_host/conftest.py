"""What several suites of kernels on the CPU want."""

import pytest

from cuda_host.adam_arrays import SEEDS
from cuda_host.blockwise_arrays import ASAN
from fusedopt import _C


@pytest.fixture
def with_fma():
    """The CPU's kernels that round as the GPU's do."""
    before = _C.isa()
    _C.set_isa("avx2")
    yield
    _C.set_isa(before)


@pytest.fixture(params=SEEDS[2:3] if ASAN else SEEDS, ids="seed{}".format)  # ASan takes its time
def seed(request, monkeypatch):
    """One order of threads."""
    monkeypatch.setenv("CUDA_HOST_SEED", str(request.param))
    return request.param
