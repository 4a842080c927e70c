"""Where the tests' tensors lie: on the CPU, on a fake GPU (FUSEDOPT_FAKE_GPU=plain or address), or on a real one.

On a fake GPU torch sees CPU tensors, and only the extension module takes their memory for a GPU's (see
cuda_host/fake_gpu.py): there, everything that runs on the CPU runs unchanged. Tests that take the fixture `device` run
once more on a real GPU, under the marker `gpu`.
"""

import os

import pytest

FAKE = os.environ.get("FUSEDOPT_FAKE_GPU", "")
device = "cpu"  # of the running test; helpers make their tensors there

not_on_fake = pytest.mark.skipif(bool(FAKE), reason="about CPU arrays")
