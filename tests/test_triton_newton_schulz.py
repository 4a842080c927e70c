"""Newton–Schulz on backend triton against its float64 reference: the numerics contract, on a GPU.

With TRITON_INTERPRET=1 (a process of its own, see run.py) the kernels run in Triton's interpreter
on CPU tensors; without it, on a GPU. Shapes are small, and so are the tiles they choose.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from test_newton_schulz import TORCH, as_float64
from test_triton_adamw import DEVICE, INTERPRETED, bits

import fusedopt
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt import reference
from fusedopt.triton_kernels import _gemm
from fusedopt.triton_kernels import newton_schulz as kernels
from newton_schulz_cases import error, gauss, plain_error, rounded, ulp
from newton_schulz_cases import with_spectrum as spectrum

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # in the interpreter's NumPy
]

FLOATS = ["float32", "bfloat16", "float16", "float64"]
HALF = FLOATS[1:3]


def spike():
    g = 1e-3 * gauss(15, 30)
    g[7, 11] = 1e3
    return g


def zero_rows():
    g = gauss(13, 30)
    g[[0, 5, 12]] = 0
    return g


FAMILIES = {
    "wide": lambda: gauss(15, 40),
    "tall": lambda: gauss(33, 17),
    "square": lambda: gauss(16, 16),
    "more tiles than one": lambda: gauss(37, 70),
    "rank 1": lambda: np.outer(gauss(16), gauss(32, seed=1)),
    "all ones": lambda: np.ones((16, 48)),
    "rank n/2": lambda: gauss(16, 8) @ gauss(8, 32, seed=1),
    "equal rows": lambda: np.repeat(gauss(4, 32), 4, axis=0),
    "positive mean": lambda: gauss(16, 48) + 1,
    "zero": lambda: np.zeros((7, 9)),
    "zero rows": zero_rows,
    "1 x 1": lambda: gauss(1, 1),
    "1 x n": lambda: gauss(1, 77),
    "n x 1": lambda: gauss(77, 1),
    "1e-20": lambda: 1e-20 * gauss(15, 30),
    "1e-38": lambda: 1e-38 * (1 + np.abs(gauss(15, 30))),
    "1e20": lambda: 1e20 * gauss(15, 30),
    "1e38": lambda: 5e37 * np.clip(gauss(15, 30), -6, 6),
    "rows over 24 decades": lambda: gauss(16, 30) * 10.0 ** np.linspace(-12, 12, 16)[:, None],
    "condition 1e3": lambda: spectrum(np.logspace(0, -3, 16), 30),
    "condition 1e8": lambda: spectrum(np.logspace(0, -8, 16), 30),
    "orthogonal": lambda: spectrum(np.ones(16), 16),
    "spike": spike,
    "symmetric": lambda: gauss(15, 15) + gauss(15, 15).T,
    "conv 4-D": lambda: gauss(2, 2, 3, 5),
    "batch": lambda: gauss(3, 10, 15),
}
INPUTS = {name: make().astype(np.float32) for name, make in FAMILIES.items()}


def triton(g, **options):
    """On the test's device; comes back as a tensor on the CPU."""
    return fusedopt.newton_schulz(g.to(DEVICE), backend="triton", **options).cpu()


def tensor(g, dtype):
    """At most 1 where a dtype needs it."""
    if dtype in HALF:
        g = g / (np.abs(g).max() or 1)
    return torch.from_numpy(np.asarray(g)).to(TORCH[dtype])


# ---- values


SCALES = ["1e-20", "1e-38", "1e20", "1e38"]  # which float16 can't have


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, d) for f in INPUTS for d in ("float32", *HALF) if d == "float32" or f not in SCALES],
)
def test_accuracy_is_the_plain_formulas(family, dtype):
    """Of the exact map of the input, in each dtype's own products; ``auto`` is standard here."""
    g = tensor(INPUTS[family], dtype)
    exact = as_float64(g)
    name = ["jordan", "polar_express", "you", "cubic"][len(family) % 4]
    want = reference.newton_schulz(exact, coefficients=name)
    bound = 2 * plain_error(exact, name, want, dtype=dtype) + 2 * ulp(dtype)
    got = triton(g, coefficients=name)
    assert got.dtype == g.dtype and error(as_float64(got), want) <= bound
    assert np.linalg.svd(as_float64(got), compute_uv=False).max() <= 1.305


@pytest.mark.parametrize("family", ["wide", "tall", "square", "rank n/2", "zero rows", "batch"])
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express", "cubic"])
def test_gram_form(family, coefficients):
    g = INPUTS[family]
    want = reference.newton_schulz(g, coefficients=coefficients)
    bound = 2 * plain_error(g, coefficients, want, gram=True) + 2 * ulp("float32")
    got = triton(tensor(g, "float32"), coefficients=coefficients, method="gram")
    assert error(as_float64(got), want) <= bound


def restarted(g, steps, dtype):
    """The Gram form with each product rounded once, as what it multiplies was."""
    x = rounded(g / np.linalg.norm(g), dtype)
    q = None
    for i, (*abc, restart) in enumerate(steps):
        a, b, c = (np.float32(value) for value in abc)
        if restart or i == 0:
            x = x if q is None else rounded(q @ x, dtype)
            r, q = rounded(x @ x.T, dtype), None
        wide = b * r + c * (r @ r)
        z = rounded(wide, dtype)
        unit = np.eye(len(x), dtype=np.float32)
        q = rounded(wide + a * unit if q is None else q @ z + a * q, dtype)
        r = rounded(r @ z + a * r, dtype)
        r = rounded(z @ r + a * r, dtype)
    return rounded(q @ x, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("restarts", [(3,), (1, 2, 3)])
@pytest.mark.parametrize("family", ["wide", "rank n/2", "positive mean", "rank 1"])
def test_gram_form_in_half_precision(family, restarts, dtype):
    """As accurate as its plain formula with the same restarts."""
    g = tensor(INPUTS[family], dtype)
    exact = as_float64(g)
    want = reference.newton_schulz(exact)
    steps = schedules.make("jordan", 5, "gram", dtype, dtype, restarts).steps
    bound = 2 * error(restarted(exact, steps, dtype), want) + 2 * ulp(dtype)
    assert error(as_float64(triton(g, method="gram", restarts=restarts)), want) <= bound


@pytest.mark.parametrize("family", ["wide", "square", "spike", "symmetric"])
def test_float64(family):
    g = FAMILIES[family]()
    want = reference.newton_schulz(g)
    for scale, method in ((1e-280, "standard"), (1e250, "gram")):
        unit = torch.from_numpy(g / np.abs(g).max() * scale)
        assert error(as_float64(triton(unit, method=method)), want) <= 1e-11
    got = triton(torch.from_numpy(g), dtype="float32")
    assert got.dtype == torch.float64
    assert error(as_float64(got), reference.newton_schulz(g, dtype="float32")) <= 1e-4


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["wide", "1e-38", "1e38", "spike", "zero rows"])
def test_rounding_to_half_precision_by_dtype(family, dtype):
    """float32 in and out; only the products' operands are rounded."""
    g = INPUTS[family]
    want = reference.newton_schulz(g, dtype=dtype)
    scaled = np.ldexp(g, 10 - np.frexp(np.abs(g).max())[1])
    bound = 2 * plain_error(rounded(scaled, dtype), "jordan", want, dtype=dtype) + ulp(dtype)
    got = triton(torch.from_numpy(g), dtype=dtype)
    assert got.dtype == torch.float32 and error(as_float64(got), want) <= bound


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("coefficients", ["you", [(3, -4, 1.5), (1.5, -0.5, 0)], (1.5, -0.5, 0)])
def test_schedules(coefficients, steps, method):
    """A cubic step among quintic ones; fewer steps than a list has, and more; restarts."""
    if isinstance(coefficients, list) and len(coefficients) > steps:
        coefficients = coefficients[:steps]
    g = spectrum(np.linspace(1, 0.2, 14), 30)
    want = reference.newton_schulz(g, coefficients=coefficients, steps=steps)
    for restarts in [None, *([(1,), (1, steps - 1)] if steps > 1 else [])]:
        got = triton(
            torch.from_numpy(g), coefficients=coefficients, steps=steps, method=method,
            restarts=restarts,
        )  # fmt: skip
        assert error(as_float64(got), want) <= 1e-13


def test_a_restart_multiplies_x_anew():
    """What restarts are for: without one, half precision loses the Gram form."""
    g = tensor(INPUTS["rank n/2"], "bfloat16")
    want = reference.newton_schulz(as_float64(g))
    good, bad = (
        error(as_float64(triton(g, method="gram", restarts=restarts)), want)
        for restarts in ((3,), ())
    )
    assert good < 0.3 and not bad < 3


# ---- the contract


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("family", ["tall", "square", "symmetric", "all ones", "one pair differs"])
def test_transpose_gives_the_transposed_bits(family, method, dtype):
    g = INPUTS.get(family, np.ones((6, 6), np.float32)).copy()
    if family == "one pair differs":
        g[4, 5] = 2
    g = tensor(g, dtype)
    got = triton(g, method=method, steps=3)
    assert torch.equal(triton(g.mT, method=method, steps=3), got.mT)
    assert torch.equal(triton(g.mT.contiguous(), method=method, steps=3), got.mT)


@pytest.mark.parametrize("seed", range(2))
def test_norm_of_a_square_matrix_and_its_transpose(seed):
    """It was summed in the order of memory: one of twelve differed from its transpose by a bit."""
    g = torch.from_numpy(np.stack([gauss(16, 16, seed=12 * seed + i) for i in range(12)]))
    assert torch.equal(triton(g.mT.contiguous(), steps=1), triton(g, steps=1).mT)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_in_their_matrix(dtype):
    g = tensor(gauss(6, 9, 12), dtype)
    g[4, 8, 11], g[1, 0, 0], g[5, 3, 3] = np.nan, np.inf, -np.inf
    g[3] = 0
    for method in ("standard", "gram"):
        got = triton(g, method=method, steps=2, restarts=(1,))
        assert got[[1, 4, 5]].isnan().all() and not got[3].any()
        for i in (2,):
            alone = triton(g[i], method=method, steps=2, restarts=(1,))
            assert torch.equal(bits(got[i]), bits(alone))


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_power_of_two_scale_leaves_every_bit(dtype):
    g = tensor(gauss(15, 30), dtype)
    want = triton(g)
    for exponent in (3, 6) if dtype == "float16" else (-100, 100):
        assert torch.equal(triton(torch.ldexp(g, torch.tensor(exponent)).to(g.dtype)), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_input_is_not_modified_and_neighbours_are_left_alone(dtype):
    around = torch.full((60, 80), 7.0, dtype=TORCH[dtype], device=DEVICE)
    g = around[10:29, 20:53]
    g.copy_(tensor(gauss(19, 33), dtype))
    before = around.clone()
    result = torch.full_like(around, 7.0)
    schedule = schedules.make("jordan", 5, "standard", dtype, dtype)
    kernels.launch(g, result[10:29, 20:53], schedule)
    assert torch.equal(around, before)
    assert torch.equal(result[10:29, 20:53].cpu(), triton(g.clone()))
    result[10:29, 20:53] = 7
    assert (result == 7).all()


STRIDED = {
    "permuted": lambda g: g[:, :3].permute(1, 0, 2),
    "steps": lambda g: g[::2, ::3, 1::2],
    "expanded": lambda g: g[:1].expand(3, -1, -1),
    "repeated rows": lambda g: g[:2, :1].expand(-1, 7, -1),
    "even rows": lambda g: g[:2, ::2, :16],
    "even columns": lambda g: g[:2, :, :16].mT,
    "columns": lambda g: g[:3].transpose(0, 2)[:2],
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_strides_are_read(layout, dtype):
    g = STRIDED[layout](tensor(gauss(4, 16, 24), dtype).to(DEVICE))
    got = fusedopt.newton_schulz(g, backend="triton", steps=1)
    assert got.shape == g.shape and got.is_contiguous()
    assert torch.equal(got, fusedopt.newton_schulz(g.contiguous(), backend="triton", steps=1))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 0), (1, 1, 1, 1)])
def test_empty_and_tiny_shapes(shape):
    got = triton(torch.ones(shape))
    assert got.shape == shape and got.isfinite().all()


def test_waves_change_no_bit(monkeypatch):
    """More matrices than go through together."""
    g = tensor(gauss(5, 16, 32), "float32")
    want = triton(g)
    monkeypatch.setattr(kernels, "WAVE", 2 * 16 * 32)
    assert torch.equal(triton(g), want)


# ---- products


def squares(numbers, tiles, n, depth, dtype, add, shifted, used):
    a, b = (torch.from_numpy(gauss(2, n, depth, seed=s)) for s in range(2))
    d = torch.from_numpy(gauss(2, n, n, seed=2))
    a, b, d = (x.to(dtype).to(DEVICE) for x in (a, b, d + d.mT))
    c, q = torch.full_like(d, torch.nan), torch.full_like(d, torch.nan)
    given = [x.view(_gemm.workspace_dtype(dtype)) for x in (a, b, d, c, q)]
    numbers = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    _gemm.symmetric(
        numbers, 0, given[0], given[1], given[2] if add else None, given[3],
        given[4] if shifted else None, used, tiles,
    )  # fmt: skip
    return [x.double().cpu() for x in (a, b, d, c, q)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("edge", "n", "depth"), [(16, 80, 32), (32, 96, 64), (64, 64, 64)])
def test_symmetric_product(edge, n, depth, dtype):
    """Of matrices whose product is not symmetric: only its lower triangle may be seen."""
    tiles = _gemm.Tiles(edge, 16, 16, 2, 1024)
    alpha, beta, shift = numbers = 1.5, -0.25, 3.0
    a, b, d, c, q = squares(numbers, tiles, n, depth, TORCH[dtype], True, True, n - 5)
    lower = torch.tril(alpha * a @ b.mT + beta * d)
    want = lower + torch.tril(lower, -1).mT
    unit = torch.diag((torch.arange(n) < n - 5).double())
    scale = alpha * a.abs() @ b.abs().mT + d.abs()
    for got, exact in ((c, want), (q, want + shift * unit)):
        assert torch.equal(got, got.mT)
        bound = ulp(dtype) * (exact.abs() + 1e-3) + depth * 1e-7 * torch.maximum(scale, scale.mT)
        assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("add", [False, True])
def test_wide_product(add, dtype):
    """With more rows of tiles than go together, and the last of these fewer."""
    tiles = _gemm.Tiles(16, 32, 16, 2, 1024)
    n, m = 9 * 16, 3 * 32
    a = torch.from_numpy(gauss(2, n, n)).to(TORCH[dtype]).to(DEVICE)
    x = torch.from_numpy(gauss(2, n, m)).to(TORCH[dtype]).to(DEVICE)
    y = torch.full_like(x, torch.nan)
    numbers = torch.tensor([0.5, -2.0], dtype=torch.float64, device=DEVICE)
    _gemm.wide(numbers, 0, *(t.view(_gemm.workspace_dtype(t.dtype)) for t in (a, x, y)), add, tiles)
    a, x, y = (t.double().cpu() for t in (a, x, y))
    want = 0.5 * a @ x - 2 * x * add
    bound = ulp(dtype) * want.abs() + n * 1e-7 * (a.abs() @ x.abs() + x.abs())
    assert ((y - want).abs() <= bound).all()


def test_tiles_cover_their_sides():
    for dtype in (torch.float16, torch.float32, torch.float64):
        for n, m in [
            (1, 1),
            (1, 77),
            (37, 101),
            (100, 130),
            (128, 7168),
            (500, 1001),
            (4096, 11008),
        ]:
            for arch in (80, 90, 120):
                t = _gemm.tiles_for(n, m, dtype, arch)
                room = _gemm.padded(n, t.edge), _gemm.padded(m, max(t.width, t.depth))
                assert room[0] % t.depth == room[1] % t.depth == room[1] % t.width == 0
                assert n <= room[0] <= max(9 / 8 * n, _gemm.padded(n, 16))
                assert t.edge >= 16 and t.width >= 16 and t.depth >= 16
    assert _gemm.tiles_for(4096, 11008, torch.float16, 90) == _gemm.Tiles(128, 256, 64, 3, 1024)
    assert _gemm.tiles_for(4096, 11008, torch.float16, 120).width == 128
    assert _gemm.tiles_for(128, 7168, torch.bfloat16, 90).edge == 64


def test_products_of_a_schedule():
    """How many are wide and how many symmetric; a cubic step has two."""
    steps = [(3.0, -4.0, 1.5, i == 2) for i in range(5)]
    counts = {
        gram: [sum((p.c == "Y") == wide for p in kernels.products(steps, gram)) for wide in (1, 0)]
        for gram in (False, True)
    }
    assert counts == {False: [5, 10], True: [2, 16]}
    assert len(kernels.products([(1.5, -0.5, 0, False)] * 5, False)) == 10


# ---- refusals


@pytest.mark.skipif(INTERPRETED, reason="the interpreter works on the CPU")
def test_arrays_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="G is on cpu, but backend 'triton' takes arrays on a GPU"):
        fusedopt.newton_schulz(torch.ones(3, 4), backend="triton")


def test_arrays_without_memory_are_refused():
    with pytest.raises((TypeError, ValueError), match="G"):
        fusedopt.newton_schulz(torch.empty(3, 4, device="meta"), backend="triton")


def test_float64_needs_a_triton_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(kernels, "TRITON", (3, 4))
    with pytest.raises(RuntimeError, match=r"float64 needs Triton 3\.5"):
        triton(torch.ones(3, 4, dtype=torch.float64))


def test_supports():
    assert fusedopt.supports("newton_schulz", "triton", dtypes=["bfloat16"], device="cuda")[0]
