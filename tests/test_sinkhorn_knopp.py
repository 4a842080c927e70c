"""Sinkhorn-Knopp on small matrices: every backend against float64, forward and backward."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import _C
from fusedopt.references import sinkhorn_knopp as reference

BACKENDS = ["cpu", "reference"]
SHAPES = [(1, 1), (2, 2), (4, 4), (8, 8), (3, 7), (7, 3), (1, 5), (5, 1)]
COUNTS = [(), (1,), (3,), (8,), (33,), (2, 5), (1025,), (0,)]
knopp = fusedopt.sinkhorn_knopp


def random(shape, dtype=np.float64, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def plain(logits, iterations):
    """The same in the logits' own dtype, as one would write it."""
    n, m = logits.shape[-2:]
    x = np.exp(logits - logits.max(-1, keepdims=True))
    for _ in range(iterations):
        x = x / x.sum(-1, keepdims=True)
        x = x / x.sum(-2, keepdims=True) * np.asarray(n / m, x.dtype)
    return x


def close(got, want, plainly, dtype):
    """Within twice the plain formula's error, and an ulp."""
    bound = 2 * abs(plainly - want).max() + np.finfo(dtype).eps * abs(want)
    assert (abs(got - want) <= bound).all(), abs(got - want).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, backend):
    for count in COUNTS:
        logits = random((*count, *shape), dtype)
        kept = logits.copy()
        result = knopp(logits, iterations=7, backend=backend)
        assert result.shape == logits.shape and result.dtype == dtype
        assert (logits == kept).all()
        if logits.size:
            close(result, reference.sinkhorn_knopp(logits, iterations=7), plain(logits, 7), dtype)


@pytest.mark.parametrize("iterations", [1, 2, 20, 100])
def test_sums(iterations):
    result = knopp(random((50, 4, 6)), iterations=iterations)
    np.testing.assert_allclose(result.sum(-2), 4 / 6, rtol=1e-14)
    rows = abs(result.sum(-1) - 1).max()
    assert rows < 1e-9 if iterations == 100 else rows > 1e-3 or iterations == 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 5), (5, 1, 2), (8, 8)])
def test_gradients(shape, backend):
    logits = torch.from_numpy(random(shape) / 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: knopp(x, iterations=6, backend=backend), (logits,), fast_mode=shape == (8, 8)
    )


@pytest.mark.parametrize("shape", [(777, 4, 4), (100, 5, 8)])
def test_gradients_in_float32(shape):
    """Against float64; the error allowed is that of torch's autograd through the plain formula."""
    logits, up = random(shape, np.float32), random(shape, np.float32, 1)
    given = torch.from_numpy(logits).requires_grad_()
    knopp(given).backward(torch.from_numpy(up))
    x = torch.from_numpy(logits).requires_grad_()
    y = (x - x.amax(-1, keepdim=True)).exp()
    for _ in range(20):
        y = y / y.sum(-1, keepdim=True)
        y = y / y.sum(-2, keepdim=True) * (shape[1] / shape[2])
    y.backward(torch.from_numpy(up))
    want = reference.backward(logits, up)
    close(given.grad.numpy(), want, x.grad.numpy(), np.float32)


def test_layouts():
    logits = random((20, 4, 4))
    expected = knopp(logits)
    assert (knopp(np.asfortranarray(logits)) == expected).all()
    columns = torch.from_numpy(logits).mT.contiguous().mT
    assert (knopp(columns).numpy() == expected).all()
    up = torch.ones(20, 4, dtype=torch.float64)[..., None].expand(20, 4, 4)  # by strides of zero
    x = torch.from_numpy(logits).requires_grad_()
    knopp(x).backward(up)
    np.testing.assert_allclose(x.grad, 0, atol=1e-12)  # the sum of all never changes


def test_threads_and_neighbours_give_the_same_bits():
    logits = random((3000, 4, 4), np.float32)
    results = []
    for threads in (1, 2):
        fusedopt.set_num_threads(threads)
        try:
            results.append(knopp(logits))
        finally:
            fusedopt.set_num_threads(None)
    assert (results[0] == results[1]).all()
    assert (knopp(logits[1234]) == results[0][1234]).all()


def test_nan_and_inf_stay_in_their_matrix():
    logits = random((9, 4, 4))
    expected = knopp(logits)
    logits[3, 1, 2] = np.nan
    logits[5, 0] = -np.inf
    result = knopp(logits)
    assert np.isnan(result[3]).all() and np.isnan(result[5]).all()
    kept = [0, 1, 2, 4, 6, 7, 8]
    assert (result[kept] == expected[kept]).all()
    logits[:, 2] += 1e4  # a row may be shifted
    np.testing.assert_allclose(knopp(logits)[kept], expected[kept], rtol=1e-11)


BAD = [
    ({"logits": np.zeros((2, 9, 4))}, ValueError, r"logits \(shape \(2, 9, 4\).*at most 8"),
    ({"logits": np.zeros(4)}, ValueError, "logits"),
    ({"logits": np.zeros((4, 4), np.int64)}, TypeError, "logits .*int64"),
    ({"iterations": 0}, ValueError, "iterations is 0"),
    ({"iterations": 101}, ValueError, "iterations is 101"),
    ({"iterations": 2.5}, TypeError, "iterations is 2.5"),
    ({"backend": "triton4"}, ValueError, "backend is 'triton4'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_errors(change, kind, message):
    arguments = {"logits": np.zeros((2, 4, 4)), "iterations": 3} | change
    with pytest.raises(kind, match=message):
        knopp(arguments.pop("logits"), **arguments)


INSTRUCTION_SETS = """
import sys, numpy as np, fusedopt
logits = np.random.default_rng(0).normal(size=(77, 4, 4)).astype(sys.argv[2])
fusedopt._C.set_isa(sys.argv[1])
eps = np.finfo(logits.dtype).eps
for shape in (4, 4), (2, 8):
    given = logits.reshape(77, *shape)
    want = fusedopt.reference.sinkhorn_knopp(given)
    np.testing.assert_allclose(fusedopt.sinkhorn_knopp(given), want, rtol=max(20 * eps, 1e-13))
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", _C.available_isas())
def test_instruction_sets(isa, dtype):
    subprocess.run([sys.executable, "-c", INSTRUCTION_SETS, isa, dtype], check=True)
