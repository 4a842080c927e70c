"""Muon and NorMuon on arrays: one differential suite for every backend, shape, dtype and option."""

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import _C, partitions, reference
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt.partitions import Contiguous, Each, Heads, Matrix, Repeat, Transposed
from fusedopt.steps.muon import row_count

BACKENDS = ["cpu", "reference"]
SHAPES = [
    *[(1, 1), (1, 7), (7, 1), (0, 5), (5, 0), (1, 129), (12, 33), (33, 12), (37, 101)],
    *[(31, 31), (64, 200), (9, 4, 3, 3), (3, 2, 5), (257, 3)],
]
OPTIONS = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8, "ns_dtype": "float32"}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [  # of parameters, gradients, momentum
    *[(F32, F32, F32), (F32, BF16, F32), (F32, F32, BF16), (F32, F64, F32), (F32, F16, BF16)],
    *[(BF16, BF16, BF16), (BF16, F32, F32), (BF16, BF16, F32), (F16, F16, F16), (F16, F32, BF16)],
    *[(F64, F64, F64), (F64, F32, F32)],
]
VARIANTS = [
    {"nesterov": False},
    {"momentum_form": "sum"},
    {"momentum_form": "sum", "nesterov": False},
    {"momentum": 0.3},
    {"momentum": 0.0},
    {"cautious_weight_decay": True},
    {"maximize": True, "grad_scale": 8.0},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "rms_norm"},
    {"adjust_lr_fn": "spectral"},
    {"adjust_lr_fn": "none"},
    {"ns_coefficients": "polar_express"},
    {"ns_coefficients": "you", "ns_method": "standard"},
    {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3},
]
QKV = [(slice(0, 8), Heads(n=2)), (slice(8, 12), "tensor"), (slice(12, 20), Heads(head_dim=4))]


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64)


def problem(normuon, shapes, dtypes, kind="tensor", axis="row", scale=1.0):
    """Parameters, momentum buffers and, for NorMuon, statistics of rows."""
    params = [normal(s, i).to(dtypes[0]) for i, s in enumerate(shapes)]
    buffers = [(normal(s, 50 + i) * 0.3 * scale).to(dtypes[2]) for i, s in enumerate(shapes)]
    if not normuon:
        return [params, buffers]
    counts = [row_count(kind, s, axis) for s in shapes]
    return [params, buffers, [normal(n, 90 + i).square().float() for i, n in enumerate(counts)]]


def gradients(shapes, dtype, step):
    return [normal(s, 1000 * step + i).to(dtype) for i, s in enumerate(shapes)]


def run(normuon, arrays, grads, **options):
    params, buffers, *rows = arrays
    step = fusedopt.normuon_step if normuon else fusedopt.muon_step
    step(params, grads, buffers, *rows, **{**OPTIONS, **options})


def truth(normuon, arrays, grads, **options):
    options = {
        k: v for k, v in {**OPTIONS, **options}.items() if k not in ("ns_dtype", "ns_method")
    }
    step = reference.normuon_step if normuon else reference.muon_step
    grads = [g.double().numpy() for g in grads]
    return [list(role) for role in step(arrays[0], grads, *arrays[1:], **options)]


def plain(normuon, arrays, grads, kind="tensor", **options):
    """The reference's formula with `u`, `o` and all the products in the working precision."""
    work = F64 if arrays[0][0].dtype == F64 else F32
    o = {**OPTIONS, "nesterov": True, "momentum_form": "ema", "maximize": False, "grad_scale": 1.0}
    o |= {"cautious_weight_decay": False, "adjust_lr_fn": None, "beta2": 0.95, "axis": "row"}
    o |= {"ns_coefficients": "jordan", "ns_steps": 5, **options}
    mu, keep = o["momentum"], 1.0 if o["momentum_form"] == "sum" else 1 - o["momentum"]
    for i, grad in enumerate(grads):
        p, m = arrays[0][i], arrays[1][i]
        g = grad.to(work) * ((-1 if o["maximize"] else 1) / o["grad_scale"])
        first = m.to(work) * mu + g * keep
        u = (first * mu + g * keep if o["nesterov"] else first).reshape(-1)
        update, line = torch.zeros_like(u), 0
        for matrix in partitions.matrices(kind, p.shape):
            view = ((matrix.rows, matrix.columns), (matrix.stride, 1), matrix.offset)
            piece = plain_newton_schulz(u.as_strided(*view), o)
            if normuon:
                lines = int(matrix.transposed)
                if o["axis"] == "short" and matrix.rows != matrix.columns:
                    lines = int(matrix.columns > matrix.rows)
                v = arrays[2][i][line : line + piece.shape[lines]]
                line += piece.shape[lines]
                mean = piece.square().mean(1 - lines)
                new = v.to(work) * o["beta2"] + mean * (1 - o["beta2"])
                scaled = piece / (new.sqrt() + 1e-10).unsqueeze(1 - lines)
                piece = scaled * (piece.norm() / (scaled.norm() + 1e-10))
                v.copy_(new)
            factor = fusedopt.references.muon.lr_factor(matrix, o["adjust_lr_fn"])
            update.as_strided(*view).copy_(piece * factor)
        update = update.reshape(p.shape)
        decayed = p.to(work) * (1 - o["lr"] * o["weight_decay"])
        if o["cautious_weight_decay"]:
            decayed = torch.where(update * p >= 0, decayed, p.to(work))
        p.copy_(decayed - update * o["lr"])
        m.copy_(first)


def plain_newton_schulz(u, options):
    """In the form asked for."""
    x = u / u.norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    identity = torch.eye(len(x), dtype=x.dtype)
    gram, q = x @ x.T, identity
    given = options["ns_coefficients"], options["ns_steps"]
    for a, b, c, _ in schedules.make(*given, "standard", "float32", "float32").steps:
        polynomial = a * identity + b * gram + c * gram @ gram
        if options["gram"]:
            q, gram = q @ polynomial, polynomial @ gram @ polynomial
        else:
            x = polynomial @ x
            gram = x @ x.T
    x = q @ x
    return x.T if u.shape[0] > u.shape[1] else x


def error(got, want):
    return float((got.double() - torch.as_tensor(want)).abs().max()) if got.numel() else 0.0


def ulp(values, dtype):
    values = np.asarray(values)
    info = torch.finfo(dtype)
    return max(info.eps * np.abs(values).max(initial=0.0), info.smallest_normal * info.eps)


def check_steps(normuon, dtypes, shapes=SHAPES, backend="cpu", steps=6, gram=False, **options):
    """Error at most twice that of the plain formula in the working precision, and one ulp.

    Largest errors over all shapes are compared: how a rounding error grows in the products depends
    on chance. float64's reference is no better than the plain formula and rounds at each step too:
    there it is three times, and an ulp per step.
    """
    kind, axis = options.get("partitions", "tensor"), options.get("axis", "row")
    larger = 20 if options.get("momentum_form") == "sum" else 1
    ours = problem(normuon, shapes, dtypes, kind, axis, larger)
    rough, exact = (problem(normuon, shapes, dtypes, kind, axis, larger) for _ in range(2))
    exact = [[x.double().numpy() for x in role] for role in exact]
    own = {**{k: v for k, v in options.items() if k != "partitions"}, "gram": gram}
    for step in range(steps):
        grads = gradients(shapes, dtypes[1], step)
        before = [g.clone() for g in grads]
        run(normuon, ours, grads, backend=backend, **options)
        assert all(map(torch.equal, grads, before))
        plain(normuon, rough, grads, kind, **own)
        exact = truth(normuon, exact, grads, **options)
    allowed, ulps = (3, steps) if dtypes[0] == F64 else (2, 1)
    for role, (got, near, want) in enumerate(zip(ours, rough, exact, strict=True)):
        bound = allowed * max(map(error, near, want))
        bound += max(ulp(w, g.dtype) for g, w in zip(got, want, strict=True)) * ulps
        for g, w, shape in zip(got, want, shapes, strict=True):
            assert error(g, w) <= bound, (role, shape, error(g, w), bound)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, normuon, dtypes):
    check_steps(normuon, dtypes, backend=backend)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_options(normuon, options):
    check_steps(normuon, (F32, F32, F32), **options)


@pytest.mark.parametrize("coefficients", ["jordan", "you"])
@pytest.mark.parametrize("ns_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_long_matrices_in_the_gram_form(normuon, ns_dtype, coefficients):
    """Where half precision is enough; the arithmetic is still float32, and nothing is rounded."""
    shapes = [(12, 33), (33, 12), (64, 200), (37, 101), (1, 129), (257, 3)]
    options = {"ns_dtype": ns_dtype, "ns_coefficients": coefficients}
    check_steps(normuon, (F32, F32, F32), shapes, gram=True, **options)


@pytest.mark.parametrize("options", [{"axis": "short"}, {"beta2": 0.3}, {"beta2": 0.0}], ids=str)
def test_options_of_normuon(options):
    check_steps(True, (F32, F32, F32), **options)
    check_steps(True, (BF16, F32, F32), **options)


@pytest.mark.parametrize("axis", ["row", "short"])
def test_lines_of_several_pieces(axis):
    """Rows of more than 2048 elements, columns of more than 128."""
    check_steps(True, (F32, F32, F32), [(3, 5000), (140, 150)], steps=2, axis=axis)


def test_more_elements_than_a_wave():
    """Of 2^24: three matrices in two waves are stepped as each alone."""
    shapes = [(1, 6_000_000), (3, 2), (1, 6_000_001), (1, 5_000_000), (2, 3)]
    together = problem(True, shapes, (F32, F32, F32))
    grads = gradients(shapes, F32, 1)
    alone = [[x.clone() for x in role] for role in together]
    run(True, together, grads)
    for i, grad in enumerate(grads):
        own = [[role[i]] for role in alone]
        run(True, own, [grad])
        for role, (want,) in zip(together, own, strict=True):
            assert torch.equal(role[i], want)


PARTITIONED = [
    (QKV, (20, 15)),
    (Heads(n=4), (20, 15)),
    (Repeat(2, [(slice(0, 4), "tensor"), (slice(4, 10), Heads(n=3))]), (20, 7)),
    (Each("tensor"), (4, 9, 14)),
    (Each(QKV), (2, 20, 6)),
    (Each(Transposed("tensor")), (4, 14, 9)),
    (Transposed("tensor"), (33, 12)),
    (Transposed(QKV), (15, 20)),
    (Transposed(QKV), (1, 20)),
]


@pytest.mark.parametrize(("kind", "shape"), PARTITIONED, ids=str)
@pytest.mark.parametrize("axis", [None, "row", "short"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32)], ids=str)
def test_partitions(kind, shape, axis, dtypes):
    options = {} if axis is None else {"axis": axis}
    check_steps(axis is not None, dtypes, [shape, shape], partitions=kind, **options)


def pieces(array, kind):
    flat = array.reshape(-1)
    return [
        flat.as_strided((m.rows, m.columns), (m.stride, 1), m.offset)
        for m in partitions.matrices(kind, array.shape)
    ]


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize(("kind", "shape"), PARTITIONED[:5], ids=str)
def test_a_piece_is_stepped_as_if_alone(kind, shape, normuon):
    whole = problem(normuon, [shape], (F32, F32, F32), kind)
    cut = [pieces(role[0].clone(), kind) for role in whole[:2]]
    if normuon:
        cut.append([v.clone() for v in whole[2][0].split([p.shape[0] for p in cut[0]])])
    grads = gradients([shape], F32, 1)
    run(normuon, whole, grads, partitions=kind)
    run(normuon, cut, [g.contiguous() for g in pieces(grads[0], kind)])
    for got, want in zip(pieces(whole[0][0], kind), cut[0], strict=True):
        assert torch.equal(got, want)
    if normuon:
        assert torch.equal(whole[2][0], torch.cat(cut[2]))


def test_matrices_of_a_partition():
    assert partitions.matrices("tensor", (4, 3, 2)) == (Matrix(0, 4, 6, 6, False),)
    assert partitions.matrices(Each(Heads(n=2)), (2, 4, 3)) == tuple(
        Matrix(6 * i, 2, 3, 3, False) for i in range(4)
    )
    assert partitions.matrices(Transposed(Heads(n=2)), (5, 6)) == (
        Matrix(0, 5, 3, 6, True),
        Matrix(3, 5, 3, 6, True),
    )
    for kind in ("row", "column", "coordinate", "global", Contiguous(2), Transposed("row")):
        with pytest.raises(ValueError, match="does not cut matrices"):
            partitions.matrices(kind, (4, 6))
    with pytest.raises(ValueError, match="too few axes"):
        partitions.matrices(Each("tensor"), (4, 6))


def layouts(array):
    """The same values: transposed, with gaps, backwards along no axis, permuted."""
    axes = tuple(range(array.ndim))[::-1]
    gaps = torch.zeros([2 * n for n in array.shape], dtype=array.dtype)
    view = gaps[tuple(slice(0, None, 2) for _ in array.shape)]
    view.copy_(array)
    return [array.permute(axes).contiguous().permute(axes), view]


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("role", [0, 1, "gradient"])
@pytest.mark.parametrize("which", [0, 1])
def test_layouts_do_not_matter(role, which, dtype, normuon):
    shapes = [(37, 41), (9, 4, 3, 3), (600, 3)]
    want = problem(normuon, shapes, (dtype, dtype, dtype))
    got = problem(normuon, shapes, (dtype, dtype, dtype))
    grads = gradients(shapes, dtype, 1)
    run(normuon, want, grads)
    if role == "gradient":
        grads = [layouts(g)[which] for g in grads]
    else:
        got[role] = [layouts(x)[which] for x in got[role]]
    run(normuon, got, grads)
    for ours, theirs in zip(got, want, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_the_same_bits_on_any_number_of_threads(normuon, dtype):
    shapes = [(300, 301), (150, 700), (5, 9), (700, 150), (64, 64)] * 2
    results = []
    before = fusedopt.get_num_threads()
    try:
        for count in (1, 2, 5):
            fusedopt.set_num_threads(count)
            arrays = problem(normuon, shapes, (dtype, dtype, dtype))
            for step in range(2):
                run(normuon, arrays, gradients(shapes, dtype, step))
            results.append(arrays)
    finally:
        fusedopt.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_every_instruction_set(isa, normuon):
    before = _C.isa()
    try:
        _C.set_isa(isa)
        for dtypes in [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32), (F64, F64, F64)]:
            check_steps(normuon, dtypes, steps=3)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_zero_and_not_finite_stay_in_their_matrix(normuon):
    shapes = [(6, 9), (6, 9), (6, 9), (4, 6, 9)]
    kinds = ["tensor"] * 3 + [Each("tensor")]
    params = [torch.ones(s) for s in shapes]
    rows = [torch.zeros(row_count(k, s)) for k, s in zip(kinds, shapes, strict=True)]
    grads = gradients(shapes, F32, 0)
    grads[0].zero_()
    grads[1][2, 3] = torch.nan
    grads[3][1, 0, 0] = torch.inf
    state = [params, [torch.zeros(s) for s in shapes], *([rows] if normuon else [])]
    run(normuon, state, grads, partitions=kinds)
    decay = 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
    assert torch.equal(params[0], torch.full((6, 9), decay))
    assert params[1].isnan().all()
    assert params[2].isfinite().all()
    assert params[3][1].isnan().all()
    assert params[3][[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_gradients_scale_does_not_matter(scale):
    """torch.optim.Muon's update is silently zero for such gradients: newton_schulz.md, 0.7."""
    arrays = [problem(False, [(20, 30)], (F32, F32, F32), scale=0.0) for _ in range(2)]
    for x, factor in zip(arrays, (1.0, scale), strict=True):
        run(False, x, [g * factor for g in gradients([(20, 30)], F32, 0)])
    torch.testing.assert_close(arrays[0][0][0], arrays[1][0][0], rtol=1e-4, atol=1e-5)


def test_normuon_keeps_the_norm_and_evens_out_the_rows():
    shape = (16, 64)
    grad = normal(shape, 1) * torch.logspace(-3, 3, 16, dtype=F64)[:, None]
    params, buffers, rows = [torch.zeros(shape)], [torch.zeros(shape)], [torch.zeros(16)]
    options = {"lr": 1.0, "weight_decay": 0.0, "beta2": 0.5, "adjust_lr_fn": "none"}
    run(True, [params, buffers, rows], [grad.float()], **options)
    muon = [[torch.zeros(shape)], [torch.zeros(shape)]]
    del options["beta2"]
    run(False, muon, [grad.float()], **options)
    torch.testing.assert_close(params[0].norm(), muon[0][0].norm())
    norms = params[0].norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(16))
    torch.testing.assert_close(rows[0], 0.5 * muon[0][0].square().mean(1))


def test_sum_form_and_scale_agree_with_the_average():
    """The buffer is 1/(1 - mu) times as large; Newton-Schulz does not see it."""
    forms = [problem(False, [(12, 20)], (F64, F64, F64), scale=0.0) for _ in range(2)]
    for step in range(4):
        grads = gradients([(12, 20)], F64, step)
        run(False, forms[0], grads)
        run(False, forms[1], grads, momentum_form="sum")
    torch.testing.assert_close(forms[0][0], forms[1][0])
    torch.testing.assert_close(forms[1][1][0] * (1 - OPTIONS["momentum"]), forms[0][1][0])


def test_absent_gradients_lists_of_numbers_and_skipped_steps():
    shapes = [(4, 6), (5, 3), (2, 2)]
    arrays = problem(True, shapes, (F32, F32, F32))
    before = [[x.clone() for x in role] for role in arrays]
    grads = gradients(shapes, F32, 0)
    run(True, arrays, grads, found_inf=torch.ones(1))
    for role, old in zip(arrays, before, strict=True):
        assert all(map(torch.equal, role, old))
    run(True, arrays, [grads[0], None, grads[2]], lr=[0.1, 0.1, 0.0], weight_decay=[0.5, 0.5, 1.0])
    assert torch.equal(arrays[0][1], before[0][1])
    assert torch.equal(arrays[0][2], before[0][2])  # lr 0
    assert not torch.equal(arrays[1][2], before[1][2])
    run(True, [[], [], []], [])


def test_numpy_arrays():
    p, g, m = (normal((6, 8), i).float().numpy() for i in range(3))
    want = [torch.tensor(p)], [torch.tensor(m)]
    fusedopt.muon_step([p], [g], [m], lr=0.1)
    fusedopt.muon_step(want[0], [torch.tensor(g)], want[1], lr=0.1)
    assert np.array_equal(p, want[0][0].numpy()) and np.array_equal(m, want[1][0].numpy())


def arrays_of(**changes):
    arrays = {
        "params": [torch.ones(4, 3), torch.ones(2, 2)],
        "grads": [torch.ones(4, 3), torch.ones(2, 2)],
        "momentum_buffers": [torch.ones(4, 3), torch.ones(2, 2)],
        "row_sqs": [torch.ones(4), torch.ones(2)],
    }
    for name, array in changes.items():
        arrays[name][1] = array
    return arrays


SHARED = torch.ones(2, 2)
BAD = [
    ({"params": torch.ones(4), "grads": torch.ones(4), "momentum_buffers": torch.ones(4)}, {},
     ValueError, r"params\[1\] \(shape \(4,\), torch.float32\): Muon takes matrices.*param_groups"),
    ({"params": torch.ones(()), "grads": torch.ones(()), "momentum_buffers": torch.ones(())}, {},
     ValueError, r"params\[1\].*Muon takes matrices"),
    ({"grads": torch.ones(2, 3)}, {}, ValueError, r"grads\[1\] .*shape differs"),
    ({"momentum_buffers": torch.ones(2, 2, dtype=F16)}, {}, TypeError, r"momentum_buffers\[1\]"),
    ({"params": torch.ones(2, 2, dtype=torch.int32)}, {}, TypeError, r"params\[1\].*floating"),
    ({"params": torch.ones(2, 2, dtype=torch.complex64)}, {}, (TypeError, ValueError), r"\[1\]"),
    ({"row_sqs": torch.ones(3)}, {}, ValueError, r"row_sqs\[1\].*has 3 elements.*2"),
    ({"row_sqs": torch.ones(2, dtype=F64)}, {}, TypeError, r"row_sqs\[1\].*float32"),
    ({"params": SHARED, "momentum_buffers": SHARED}, {}, ValueError, "shares memory"),
    ({"params": torch.ones(1, 2).expand(2, 2)}, {}, ValueError, r"params\[1\].*share memory"),
    ({}, {"partitions": "row"}, ValueError, r"params\[0\]: partition 'row' does not cut matrices"),
    ({}, {"partitions": [Heads(n=2), Heads(n=3)]}, ValueError, r"params\[1\]: .*Heads\(n=3\)"),
    ({}, {"lr": -1.0}, ValueError, "lr is -1.0"),
    ({}, {"lr": [0.1]}, ValueError, "lr has 1 numbers"),
    ({}, {"momentum": -0.1}, ValueError, "momentum is -0.1"),
    ({}, {"beta2": 1.0}, ValueError, "beta2 is 1.0"),
    ({}, {"axis": "column"}, ValueError, "axis is 'column'"),
    ({}, {"adjust_lr_fn": "x"}, ValueError, "adjust_lr_fn is 'x', expected one of original"),
    ({}, {"momentum_form": "x"}, ValueError, "momentum_form is 'x'"),
    ({}, {"ns_steps": 0}, ValueError, "steps is 0"),
    ({}, {"ns_coefficients": "x"}, ValueError, "coefficients is 'x'"),
    ({}, {"ns_coefficients": [(1.0, 2.0)]}, ValueError, "coefficients is"),
    ({}, {"ns_dtype": torch.int8}, ValueError, "ns_dtype is torch.int8"),
    ({}, {"ns_method": "x"}, ValueError, "method is 'x'"),
    ({}, {"grad_scale": 0.0}, ValueError, "grad_scale is 0"),
    ({}, {"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    ({}, {"stream": 3}, ValueError, "stream is 3"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "kind", "message"), BAD, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named_and_nothing_is_written(changes, options, kind, message, backend):
    arrays = arrays_of(**changes)
    before = {name: [x.clone() for x in role] for name, role in arrays.items()}
    with pytest.raises(kind, match=message):
        fusedopt.normuon_step(**arrays, **{"backend": backend, **options})
    for name, role in arrays.items():
        assert all(map(torch.equal, role, before[name]))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_backends_are_refused(backend):
    arrays = arrays_of()
    with pytest.raises((ValueError, RuntimeError), match=backend):
        fusedopt.normuon_step(**arrays, backend=backend)


def test_autograd_learns_of_the_write():
    p = torch.ones(2, 3, requires_grad=True)
    loss = (p * p).sum()
    fusedopt.muon_step([p.detach()], [torch.ones(2, 3)], [torch.zeros(2, 3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
