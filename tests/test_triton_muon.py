"""Muon and NorMuon on backend triton: the bounds of every backend, and momentum in the CPU's bits.

With TRITON_INTERPRET=1 (a process of its own, see run.py) the kernels run in Triton's interpreter,
on CPU tensors and on stand-ins for GPU tensors whose memory is the CPU's; without it, on a GPU.
"""

import pytest
import torch

pytest.importorskip("triton")

from test_triton_adamw import DEVICE, INTERPRETED, bits, on_cpu, on_gpu, with_fma

import fusedopt
from fusedopt import _C
from fusedopt.partitions import Each, Heads, Transposed
from test_muon import BF16, F16, F32, F64, QKV, check_steps, gradients, problem, run

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif("avx2" not in _C.available_isas(), reason="the CPU backend has no fma here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # in the interpreter's NumPy
]
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="compares CPU tensors")
with_fma = with_fma  # a fixture

SHAPES = [(7, 1), (0, 5), (12, 16), (4, 3, 2, 2)]
FEW = {"backend": "triton", "steps": 2, "ns_steps": 2}
BOTH = pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])


# ---- values


@interpreted_only
@pytest.mark.parametrize(
    "dtypes",
    [(F32, F32, F32), (F32, F64, BF16), (BF16,) * 3, (F16, F32, BF16), (F64,) * 3],
    ids=str,
)
@BOTH
def test_dtypes_against_float64(normuon, dtypes):
    check_steps(normuon, dtypes, SHAPES, **FEW)


@interpreted_only
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False, "cautious_weight_decay": True},
        {"momentum_form": "sum", "adjust_lr_fn": "spectral"},
        {"momentum": 0.3, "maximize": True, "grad_scale": 8.0, "adjust_lr_fn": "rms_norm"},
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "adjust_lr_fn": "none"},
    ],
    ids=str,
)
@BOTH
def test_options_against_float64(normuon, options):
    check_steps(normuon, (F32, F32, F32), SHAPES[2:], **{**FEW, **options})


@interpreted_only
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (QKV, (20, 15)),
        (Heads(n=4), (20, 15)),
        (Each(Transposed("tensor")), (3, 14, 9)),
        (Transposed("tensor"), (16, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("axis", [None, "row", "short"])
def test_partitions_against_float64(kind, shape, axis):
    options = {} if axis is None else {"axis": axis}
    check_steps(
        axis is not None,
        (BF16, F32, F32),
        [shape],
        partitions=kind,
        **{**FEW, "steps": 1},
        **options,
    )


@interpreted_only
@pytest.mark.parametrize("axis", [None, "row", "short"])
def test_chunks_and_vectors(axis):
    """Matrices of more than one chunk, with 16-byte accesses and without; lines of many tiles."""
    options = {} if axis is None else {"axis": axis}
    shapes = [(4, 1208), (5, 1009)]
    check_steps(axis is not None, (F32, F32, F32), shapes, "triton", steps=1, ns_steps=1, **options)


# ---- momentum


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16), (F64, F32, F32)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_form": "sum"}, {"momentum": 0.3, "maximize": True, "grad_scale": 3.0}],
    ids=str,
)
def test_momentum_has_the_bits_of_the_cpus(dtypes, options):
    """Flat, and by strides: parameters permuted, gradients expanded."""
    shapes = [(8, 16), (7, 9), (2, 3, 5)]
    want = problem(False, shapes, dtypes)
    grads = gradients(shapes, dtypes[1], 0)
    got = [[x.clone().to(DEVICE) for x in role] for role in want]
    apart = [[spread(x.to(DEVICE)) for x in role] for role in want]
    run(False, want, grads, backend="cpu", ns_steps=1, **options)
    there = [g.to(DEVICE) for g in grads]
    run(False, got, there, backend="triton", ns_steps=1, **options)
    run(False, apart, [spread(g) for g in there], backend="triton", ns_steps=1, **options)
    for x, y, z in zip(got[1], apart[1], want[1], strict=True):
        assert torch.equal(bits(x), bits(z)) and torch.equal(bits(y), bits(z))
    for x, y in zip(got[0], apart[0], strict=True):
        assert torch.equal(bits(x), bits(y))


def spread(x):
    """The same values, last axis first in memory, with a gap after each."""
    base = torch.stack([x, x], -1)
    return base.movedim(-2, 0).contiguous().movedim(0, -2)[..., 0]


# ---- numbers on the device


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@BOTH
def test_numbers_on_the_device(normuon, found_inf):
    """lr, decay, momentum, loss scale and found_inf lie there; nobody waits for them."""
    shapes = [(12, 16), (9, 4)]
    want = problem(normuon, shapes, (F32, F32, F32))
    before = [[x.clone() for x in role] for role in want]
    grads = gradients(shapes, F32, 0)
    got = [[on_gpu(x) for x in role] for role in want]
    numbers = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.7, "grad_scale": 1024.0}
    device = {name: on_gpu(torch.tensor(x, dtype=F64)) for name, x in numbers.items()}
    if found_inf is not None:
        device["found_inf"] = on_gpu(torch.tensor(found_inf))
    there = [on_gpu(g) for g in grads]
    options = {"ns_steps": 2, "maximize": True}
    stream = 0 if INTERPRETED else None
    run(normuon, got, there, backend="triton", stream=stream, **options, **device)
    if not found_inf:
        run(normuon, want, grads, backend="cpu", **options, **numbers)
    for role, (ours, theirs) in enumerate(zip(got, before if found_inf else want, strict=True)):
        for x, y in zip(ours, theirs, strict=True):
            tolerance = 0.0 if found_inf or role == 1 else 1e-5
            torch.testing.assert_close(on_cpu(x), y, rtol=tolerance, atol=tolerance)


# ---- the contract


@BOTH
def test_nan_stays_in_its_matrix(normuon):
    shapes = [(8, 16), (8, 16), (9, 7)]
    arrays = problem(normuon, shapes, (F32, F32, F32))
    grads = gradients(shapes, F32, 0)
    clean = [[x.clone().to(DEVICE) for x in role] for role in arrays]
    run(normuon, clean, [g.to(DEVICE) for g in grads], backend="triton", ns_steps=2)
    grads[1][3, 3] = torch.nan
    got = [[x.to(DEVICE) for x in role] for role in arrays]
    run(normuon, got, [g.to(DEVICE) for g in grads], backend="triton", ns_steps=2)
    assert got[0][1].isnan().all()
    for x, y in zip(got, clean, strict=True):
        for i in (0, 2):
            assert torch.equal(bits(x[i]), bits(y[i]))


@BOTH
def test_neighbours_are_left_alone(normuon):
    around = [torch.full((12, 40), 7.0, device=DEVICE) for _ in range(3)]
    inner = [x[2:9, 8:24] for x in around]
    for i, x in enumerate(inner):
        x.copy_(gradients([x.shape], F32, i)[0])
    rows = [[torch.full((7 + 16,), 7.0, device=DEVICE)]] if normuon else []
    arrays = [[inner[0]], [inner[2]], *([[r[0][8:15]] for r in rows])]
    run(normuon, arrays, [inner[1]], backend="triton", ns_steps=1)
    for x, y in zip(around, inner, strict=True):
        assert (y != 7).all()
        y.fill_(7)
        assert (x == 7).all()
    assert all((r[0][:8] == 7).all() and (r[0][15:] == 7).all() for r in rows)


def test_waves_change_no_bit(monkeypatch):
    from fusedopt.triton_kernels import muon

    shapes = [(8, 16)] * 3
    want = [[x.to(DEVICE) for x in role] for role in problem(True, shapes, (F32, F32, F32))]
    got = [[x.clone() for x in role] for role in want]
    grads = [g.to(DEVICE) for g in gradients(shapes, F32, 0)]
    run(True, want, grads, backend="triton", ns_steps=1)
    monkeypatch.setattr(muon, "WAVE", 200)
    run(True, got, grads, backend="triton", ns_steps=1)
    assert all(
        torch.equal(x, y) for a, b in zip(got, want, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_supports():
    for name in ("muon_step", "normuon_step"):
        assert fusedopt.supports(name, "triton", dtypes=["bfloat16"], device="cuda")[0]
