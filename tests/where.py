"""Where the tests' tensors lie: on the CPU, on a fake GPU, or on a real one.

FUSEDOPT_FAKE_GPU=plain or address makes torch's CPU memory count as a GPU's: torch sees CPU
tensors, only the extension module is told otherwise (cuda_host/fake_gpu.py): suites run unchanged.
Tests that take the fixture `device` run once more on a real GPU, under the marker `gpu`.
"""

import os

import pytest

FAKE = os.environ.get("FUSEDOPT_FAKE_GPU", "")
DEVICES = ["cpu", *([] if FAKE else [pytest.param("cuda", marks=pytest.mark.gpu)])]
device = "cpu"  # of the running test; helpers make their tensors there

not_on_fake = pytest.mark.skipif(bool(FAKE), reason="about CPU arrays")
