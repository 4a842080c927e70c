"""The functional AdamW step on torch tensors: one differential suite for every backend."""

import threading

import numpy as np
import pytest
import torch

import fusedopt
import where
from fusedopt import _C, reference
from fusedopt.backends import why_missing

SIZES = [0, 1, 3, 31, 32, 33, 255, 4097, 10007]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.1}
BACKENDS = [None, "reference"]  # the device's own, and the truth


def states_of(param):
    """The dtypes that states may have beside a parameter of this dtype."""
    return sorted({param, torch.float32, torch.bfloat16}, key=str)


COMBINATIONS = [(p, g, s) for p in FLOATS for g in FLOATS for s in states_of(p)]


def lists(dtypes, seed=0, amsgrad=False, sizes=SIZES):
    """Parameters, gradients and states of random values, gradients over eight decades."""
    rng = torch.Generator().manual_seed(seed)
    p, g, s = ({"device": where.device, "dtype": dtype} for dtype in dtypes)

    def normal(n):
        return torch.randn(n, generator=rng, dtype=torch.float64)

    result = [
        [normal(n).to(**p) for n in sizes],
        [(normal(n) * 10 ** (4 * torch.rand(n, generator=rng) - 3)).to(**g) for n in sizes],
        [normal(n).mul(0.1).to(**s) for n in sizes],
        [normal(n).square().to(**s) for n in sizes],
    ]
    return [*result, [normal(n).square().to(**s) for n in sizes]] if amsgrad else result


def copies(arrays):
    return [[x.clone() for x in role] for role in arrays]


def plain_step(arrays, step, maximize, work):
    """The formula, each operation rounded to `work`, results to the tensors' own dtypes."""
    p, g, m, v, *u = (x.to(work) for x in arrays)
    g = -g if maximize else g
    b1, b2 = OPTIONS["betas"]
    m = m * b1 + g * (1 - b1)
    v = v * b2 + g * g * (1 - b2)
    u = [torch.maximum(u[0], v)] if u else []
    root = (u[0] if u else v).sqrt() / (1 - b2**step) ** 0.5 + OPTIONS["eps"]
    p = p * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - m / root * (
        OPTIONS["lr"] / (1 - b1**step)
    )
    return [x.to(old.dtype) for x, old in zip((p, arrays[1], m, v, *u), arrays, strict=True)]


def error(got, want):
    return float((got.cpu().double() - torch.as_tensor(want)).abs().max()) if got.numel() else 0.0


def ulp(values, dtype):
    info = torch.finfo(dtype)
    largest = float(torch.as_tensor(values).abs().max()) if values.size else 0.0
    return max(info.eps * largest, info.smallest_normal * info.eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("amsgrad", "maximize"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_steps_against_float64(backend, dtypes, amsgrad, maximize):
    """Every size in one list, each dtype of parameter, gradient and state: eight steps."""
    ours = lists(dtypes, amsgrad=amsgrad)
    rough = [list(x) for x in zip(*copies(ours), strict=True)]
    exact = [[x.double().cpu().numpy() for x in role] for role in ours]
    work = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    for step in range(3, 11):
        grads = lists(dtypes, seed=step)[1]
        p, _, m, v, *u = ours
        maxima = {"max_exp_avg_sqs": u[0]} if amsgrad else {}
        fusedopt.adamw_step(
            p, grads, m, v, step=step, maximize=maximize, backend=backend, **maxima, **OPTIONS
        )
        p, _, m, v, *u = exact
        maxima = {"max_exp_avg_sqs": u[0]} if amsgrad else {}
        r = reference.adamw_step(
            p, [g.double().cpu().numpy() for g in grads], m, v,
            step=step, maximize=maximize, **maxima, **OPTIONS,
        )  # fmt: skip
        exact = [r.params, None, r.exp_avgs, r.exp_avg_sqs, *([r.max_exp_avg_sqs] if u else [])]
        for i, g in enumerate(grads):
            rough[i] = plain_step([rough[i][0], g, *rough[i][2:]], step, maximize, work)
    for role in [0, 2, 3, *([4] if amsgrad else [])]:
        for i in range(len(SIZES)):
            want, got = exact[role][i], ours[role][i]
            # Twice the plain formula's error and an ulp; where both are exact in float64, its ulps.
            bound = 2 * error(rough[i][role], want) + ulp(want, got.dtype)
            bound += 8 * 4 * ulp(want, torch.float64)
            assert error(got, want) <= bound, (role, SIZES[i])


def laid_out(x, layout):
    """A tensor of x's values in another layout."""
    if layout == "contiguous":
        return x.clone()
    if layout == "channels_last":
        return x.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "gaps":
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    assert layout == "offset"
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps", "offset"]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
def test_layouts_give_the_bits_of_contiguous_tensors(layouts, dtype):
    """torch 2.13's own fused step on the CPU mixes elements up where layouts differ."""
    straight = lists((dtype,) * 3, sizes=[2 * 5 * 7 * 33])
    for role in straight:
        role[0] = role[0].view(2, 5, 7, 33)
    inner, outer = layouts  # states and gradient otherwise than the parameter
    laid = [[laid_out(role[0], outer if i in (1, 3) else inner)] for i, role in enumerate(straight)]
    for p, g, m, v in (straight, laid):
        fusedopt.adamw_step(p, g, m, v, step=4, **OPTIONS)
    for a, b in zip(straight, laid, strict=True):
        assert torch.equal(a[0], b[0])


@pytest.mark.usefixtures("device")
def test_expanded_gradient():
    p, m, v, q, s, t = (torch.zeros(5, 7, device=where.device) for _ in range(6))
    fusedopt.adamw_step([p], [p.new_ones(()).expand(5, 7)], [m], [v], step=1)
    fusedopt.adamw_step([q], [torch.ones_like(q)], [s], [t], step=1)
    assert torch.equal(p, q)
    assert torch.equal(v, t)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_same_bits_for_any_thread_count(dtype):
    sizes = [100_003, 5, 70_000, 1, 64_000]
    results = []
    for threads in (1, 2, 3, 7):
        arrays = lists((dtype,) * 3, sizes=sizes)
        fusedopt.set_num_threads(threads)
        fusedopt.adamw_step(*arrays, step=2, **OPTIONS)
        results.append(arrays)
    fusedopt.set_num_threads(None)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", _C.available_isas())
def test_same_bits_for_mixed_and_uniform_dtypes(name):
    """Mixes without a kernel of their own pass through tiles: that may not change a bit."""
    before = _C.isa()
    _C.set_isa(name)
    try:
        p, g, m, v = lists((torch.float32,) * 3)
        g = [x.to(torch.float16).float() for x in g]  # so that float16 holds them exactly
        q, _, s, t = copies((p, g, m, v))
        fusedopt.adamw_step(p, g, m, v, step=2, **OPTIONS)
        fusedopt.adamw_step(q, [x.to(torch.float16) for x in g], s, t, step=2, **OPTIONS)
    finally:
        _C.set_isa(before)
    for a, b in [(p, q), (m, s), (v, t)]:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("device")
def test_per_tensor_scalars_and_counters():
    """One list with a step, lr and decay per tensor equals one call per tensor."""
    arrays = lists((torch.float32,) * 3)
    alone = copies(arrays)
    lr = [0.01 * (i + 1) for i in range(len(SIZES))]
    decay = [0.1 * i for i in range(len(SIZES))]
    counters = [torch.tensor(float(i)) for i in range(len(SIZES))]
    fusedopt.adamw_step(*arrays, step=counters, lr=lr, weight_decay=decay)
    for i, roles in enumerate(zip(*alone, strict=True)):
        fusedopt.adamw_step(
            *([x] for x in roles), step=i + 1, lr=torch.tensor(lr[i], dtype=torch.float64),
            weight_decay=decay[i],
        )  # fmt: skip
    assert [int(c) for c in counters] == list(range(1, len(SIZES) + 1))
    for a, b in zip(arrays, alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    counts = np.arange(len(SIZES), dtype=np.float32)
    fusedopt.adamw_step(*arrays, step=counts)
    assert counts.tolist() == list(range(1, len(SIZES) + 1))


@pytest.mark.usefixtures("device")
def test_complex_tensors_are_pairs_of_reals():
    rng = torch.Generator().manual_seed(0)
    p, g, m = (torch.randn(9, 11, dtype=torch.complex64, generator=rng) for _ in range(3))
    v = torch.view_as_complex(torch.rand(9, 11, 2, generator=rng))
    p, g, m, v = (x.to(where.device) for x in (p, g, m, v))
    reals = [torch.view_as_real(x).clone() for x in (p, g, m, v)]
    fusedopt.adamw_step([p], [g], [m], [v], step=2)
    fusedopt.adamw_step(*([x] for x in reals), step=2)
    assert torch.equal(torch.view_as_real(p), reals[0])
    with pytest.raises(TypeError, match=r"grads\[0\].*pending conjugation"):
        fusedopt.adamw_step([p], [g.conj()], [m], [v], step=2)


@pytest.mark.usefixtures("device")
def test_version_counters_are_bumped():
    """A backward pass through a tensor saved before the step must fail, not use new values."""
    w = torch.ones(3, requires_grad=True, device=where.device)
    loss = (w * w).sum()
    states = [torch.zeros_like(w, requires_grad=False) for _ in range(2)]
    fusedopt.adamw_step([w], [torch.ones_like(states[0])], [states[0]], [states[1]], step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_any_dlpack_array():
    """A producer that has nothing but __dlpack__, in the old and in the new protocol."""

    class Old:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            if options:
                raise TypeError("unexpected keyword argument")
            return self.tensor.__dlpack__()

        def __dlpack_device__(self):
            return (1, 0)

    class New(Old):
        def __dlpack__(self, *, max_version=None):
            return self.tensor.__dlpack__(max_version=max_version)

    for wrap in (Old, New):
        arrays = lists((torch.bfloat16,) * 3)
        wrapped = [[wrap(x) for x in role] for role in copies(arrays)]
        fusedopt.adamw_step(*wrapped, step=1)
        fusedopt.adamw_step(*arrays, step=1)
        for a, b in zip(arrays, wrapped, strict=True):
            assert all(torch.equal(x, y.tensor) for x, y in zip(a, b, strict=True))


def test_torch_without_the_exchange_api():
    """torch before 2.10: tensors are read through their attributes."""
    attributes = ("data_ptr", "shape", "stride", "dtype", "device", "layout")

    class Bare:
        def __init__(self, tensor):
            self.tensor = tensor

    for name in attributes:
        setattr(Bare, name, property(lambda self, name=name: getattr(self.tensor, name)))
    arrays = lists((torch.float16,) * 3)
    bare = [[Bare(x) for x in role] for role in copies(arrays)]
    fusedopt.adamw_step(*bare, step=1)
    fusedopt.adamw_step(*arrays, step=1)
    for a, b in zip(arrays, bare, strict=True):
        assert all(torch.equal(x, y.tensor) for x, y in zip(a, b, strict=True))


ONE = {"step": 1}
BAD_CALLS = {
    "lr negative": (ONE | {"lr": -1e-3}, ValueError, "lr is -0.001"),
    "lr NaN": (ONE | {"lr": float("nan")}, ValueError, "lr is nan"),
    "lr infinite": (ONE | {"lr": float("inf")}, ValueError, "lr is inf"),
    "lr text": (ONE | {"lr": "fast"}, TypeError, "lr is 'fast'"),
    "lr of two": (ONE | {"lr": [1e-3, 1e-3]}, ValueError, "lr has 2 numbers, expected one, or 3"),
    "decay negative": (ONE | {"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
    "eps negative": (ONE | {"eps": -1e-8}, ValueError, "eps is -1e-08"),
    "beta of 1": (ONE | {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    "step 0": ({"step": 0}, ValueError, "step is 0, but steps count from 1"),
    "step bool": ({"step": True}, TypeError, "step is True"),
    "step fractional": ({"step": torch.tensor(0.5)}, ValueError, "step is 0.5"),
    "step negative": ({"step": torch.tensor(-1)}, ValueError, "step is -1"),
    "steps too few": ({"step": [torch.tensor(0)]}, ValueError, "step has 1 counters, expected 3"),
    "scale 0": (ONE | {"grad_scale": 0.0}, ValueError, "grad_scale is 0"),
    "scale NaN": (ONE | {"grad_scale": float("nan")}, ValueError, "grad_scale is nan"),
    "stream": (ONE | {"stream": 1}, ValueError, "stream is 1"),
    "backend": (ONE | {"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of"),
}
if why_missing("triton"):
    BAD_CALLS["backend missing"] = (
        ONE | {"backend": "triton"}, RuntimeError, "'triton' is not available",
    )  # fmt: skip


MARKS = {
    "step fractional": pytest.mark.host_counters,
    "step negative": pytest.mark.host_counters,
    "stream": where.not_on_fake,
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=MARKS.get(c, ())) for c in BAD_CALLS])
def test_bad_options_are_refused_before_the_first_write(case):
    options, kind, message = BAD_CALLS[case]
    arrays = lists((torch.float32,) * 3, sizes=[5, 40, 3])
    before = copies(arrays)
    with pytest.raises(kind, match=message):
        fusedopt.adamw_step(*arrays, **options)
    for a, b in zip(arrays, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def replace(role, index, make):
    def change(arrays):
        arrays[role][index] = make(arrays)

    return change


BAD_ARRAYS = {
    "shape": (
        replace(1, 2, lambda a: torch.zeros(4)), ValueError,
        r"grads\[2\] \(shape \(4,\), torch.float32\): shape differs from params\[2\] .*\(3,\)",
    ),
    "integer": (replace(0, 2, lambda a: torch.zeros(3, dtype=torch.int32)), TypeError,
                r"params\[2\] .*expected a floating-point dtype"),
    "dtype": (replace(3, 2, lambda a: torch.zeros(3, dtype=torch.float64)), TypeError,
              r"exp_avg_sqs\[2\] .*float64.*params\[2\].*float32"),
    "bool": (replace(1, 2, lambda a: torch.zeros(3, dtype=torch.bool)), TypeError,
             r"grads\[2\] .*not supported"),
    "no array": (replace(2, 2, lambda a: 3.0), TypeError, r"exp_avgs\[2\] \(float\)"),
    "none": (replace(1, 2, lambda a: None), TypeError, r"grads\[2\] \(NoneType\)"),
    "list": (replace(1, 2, lambda a: [0.0] * 3), TypeError, r"grads\[2\] \(list\)"),
    "gradient in a state": (replace(1, 2, lambda a: a[2][1][:3]), ValueError,
                            r"exp_avgs\[1\] is written, but shares memory with grads\[2\]"),
    "expanded": (replace(0, 2, lambda a: torch.zeros(1).expand(3)), ValueError,
                 r"params\[2\] .*its elements share memory"),
    "meta": (replace(0, 2, lambda a: torch.zeros(3, device="meta")), TypeError,
             r"params\[2\].*meta"),
    "sparse": (replace(1, 2, lambda a: torch.zeros(3).to_sparse()), RuntimeError, "sparse"),
    "big-endian": (replace(1, 2, lambda a: np.zeros(3, ">f4")), TypeError,
                   r"grads\[2\].*not supported"),
    "same memory twice": (replace(0, 0, lambda a: a[0][1][:5]), ValueError,
                          r"params\[[01]\] is written, but shares"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused_before_the_first_write(case):
    change, kind, message = BAD_ARRAYS[case]
    arrays = lists((torch.float32,) * 3, sizes=[5, 40, 3])
    change(arrays)
    before = copies([role[:2] for role in arrays])
    counter = torch.tensor(3.0)
    with pytest.raises(kind, match=message):
        fusedopt.adamw_step(*arrays, step=counter)
    assert counter == 3
    for a, b in zip(arrays, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=False))


def test_lists_of_different_lengths():
    arrays = lists((torch.float32,) * 3)
    with pytest.raises(ValueError, match="grads has 8 arrays, but params has 9"):
        fusedopt.adamw_step(arrays[0], arrays[1][:-1], *arrays[2:], step=1)
    with pytest.raises(TypeError, match="params is a Tensor, expected a list"):
        fusedopt.adamw_step(torch.zeros(3), *arrays[1:], step=1)


@pytest.mark.usefixtures("device")
def test_nan_and_inf_stay_where_they_are():
    p, g, m, v = (x[0] for x in lists((torch.float32,) * 3, sizes=[1000]))
    g[17], g[18], g[999] = float("nan"), float("inf"), float("-inf")
    fusedopt.adamw_step([p], [g], [m], [v], step=1)
    bad = torch.zeros(1000, dtype=torch.bool, device=where.device)
    bad[[17, 18, 999]] = True
    assert torch.equal(~p.isfinite(), bad)
    assert torch.equal(~m.isfinite(), bad)


def test_calls_from_many_threads():
    """Disjoint arrays from any thread, also while the pool is busy with another's work."""
    want = lists((torch.float32,) * 3, sizes=[200_000])
    for step in range(1, 6):
        fusedopt.adamw_step(*want, step=step)
    results = [lists((torch.float32,) * 3, sizes=[200_000]) for _ in range(6)]

    def work(arrays):
        for step in range(1, 6):
            fusedopt.adamw_step(*arrays, step=step)

    threads = [threading.Thread(target=work, args=(arrays,)) for arrays in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for arrays in results:
        assert torch.equal(arrays[0][0], want[0][0])
