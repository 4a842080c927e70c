"""Newton–Schulz against its float64 reference: every family of inputs in the numerics contract."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fusedopt
import where
from fusedopt import _newton_schulz_schedule as schedules
from fusedopt import reference
from fusedopt.steps.newton_schulz import OPERATION
from newton_schulz_cases import (
    FAMILIES,
    FEW,
    INPUTS,
    NUMPY,
    SETS,
    error,
    gauss,
    plain_error,
    rounded,
    ulp,
    with_spectrum,
)
from where import FAKE, not_on_fake

# Its own numbers in a launch are the schedule's, so where 0-d tensors lie makes no difference.
pytestmark = pytest.mark.device_numbers
everywhere = pytest.mark.usefixtures("device")
every_family = pytest.mark.parametrize("family", FEW if FAKE else INPUTS)
every_set = pytest.mark.parametrize("coefficients", ["jordan", "polar_express"] if FAKE else SETS)

TORCH = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
TORCH["float32"] = torch.float32


def as_float64(x):
    if isinstance(x, torch.Tensor):
        return x.double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def on_gpu():
    return bool(FAKE) or where.device == "cuda"


def as_tensor(g):
    """A NumPy array's numbers as a tensor on the tests' device, in the same order of strides."""
    bfloat16 = g.dtype == NUMPY["bfloat16"]
    tensor = torch.from_numpy(g.view(np.int16) if bfloat16 else g)
    return (tensor.view(torch.bfloat16) if bfloat16 else tensor).to(where.device)


def last_bits():
    """What float32 may be off where one singular value is all, and the plain formula lucky.

    On a GPU the norm goes into two factors of the first products, each with a rounding of its own.
    """
    return (4 if on_gpu() else 2) * ulp("float32")


def newton_schulz(g, **options):
    """Of a NumPy array; by way of a tensor where that has to lie on a GPU."""
    if not on_gpu():
        return fusedopt.newton_schulz(g, **options)
    result = fusedopt.newton_schulz(as_tensor(g), **options).cpu()
    if result.dtype == torch.bfloat16:
        return result.view(torch.int16).numpy().view(NUMPY["bfloat16"])
    return result.numpy()


@everywhere
@every_set
@every_family
def test_float32_is_as_accurate_as_the_plain_formula(family, coefficients):
    """Also what auto takes: it is never the less stable method."""
    g = INPUTS[family]
    want = reference.newton_schulz(g, coefficients=coefficients)
    bound = 2 * plain_error(g, coefficients, want) + last_bits()
    for method in ("standard", "auto"):
        got = newton_schulz(g, coefficients=coefficients, method=method)
        assert got.dtype == np.float32 and error(got, want) <= bound, method


@everywhere
@every_set
@every_family
def test_gram_form_is_as_accurate_as_its_plain_formula(family, coefficients):
    g = INPUTS[family]
    want = reference.newton_schulz(g, coefficients=coefficients)
    bound = 2 * plain_error(g, coefficients, want, gram=True) + last_bits()
    got = newton_schulz(g, coefficients=coefficients, method="gram")
    assert error(got, want) <= bound


@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_set
@every_family
def test_half_precision_inputs(family, coefficients, dtype):
    """Against the exact map of the rounded input; ``auto`` takes the Gram form of long matrices.

    On a GPU that form's products are rounded too; where rounding is coherent it may cost more.
    """
    g = (INPUTS[family] / (np.abs(INPUTS[family]).max() or 1)).astype(NUMPY[dtype])
    exact = as_float64(g)
    want = reference.newton_schulz(exact, coefficients=coefficients)
    plain = plain_error(exact, coefficients, want, dtype=dtype)
    coherent = on_gpu() and family in ("rank 1", "all ones", "positive mean")
    for method in ("standard", "gram", "auto"):
        bound = (3 if coherent and method != "standard" else 2) * plain + ulp(dtype)
        got = newton_schulz(g, coefficients=coefficients, method=method)
        assert got.dtype == g.dtype and error(as_float64(got), want) <= bound, method


@everywhere
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_family
def test_rounding_to_half_precision_by_dtype(family, dtype):
    """float32 in and out; only the input is rounded, after a scaling that keeps it in range."""
    g = INPUTS[family]
    want = reference.newton_schulz(g, dtype=dtype)
    largest = np.abs(g).max(axis=(-2, -1), keepdims=True)
    scaled = rounded(np.ldexp(g, 10 - np.frexp(largest)[1]), dtype)
    bound = 2 * plain_error(scaled, "jordan", want, dtype=dtype) + ulp(dtype)
    for method in ("standard", "auto"):
        got = newton_schulz(g, dtype=TORCH[dtype], method=method)
        assert got.dtype == np.float32 and error(got, want) <= bound, method
    if dtype == "bfloat16" and np.abs(g).max() > 1e-30:
        assert np.array_equal(got, newton_schulz(rounded(g, dtype), dtype=dtype))


@everywhere
@every_set
@every_family
def test_float64(family, coefficients):
    g = FAMILIES[family]()
    want = reference.newton_schulz(g, coefficients=coefficients)
    for scale in (1.0, 1e-280, 1e250):
        unit = g / (np.abs(g).max() or 1)
        got = newton_schulz(unit * scale, coefficients=coefficients)
        assert got.dtype == np.float64 and error(got, want) <= 1e-11
    by_float32 = newton_schulz(g, dtype="float32", coefficients=coefficients)
    exact = reference.newton_schulz(g, dtype="float32", coefficients=coefficients)
    assert by_float32.dtype == np.float64 and error(by_float32, exact) <= 1e-4


@everywhere
@pytest.mark.parametrize("method", ["standard", "gram"])
@every_set
@every_family
def test_no_singular_value_runs_away(family, coefficients, method):
    got = newton_schulz(INPUTS[family], coefficients=coefficients, method=method)
    assert np.linalg.svd(as_float64(got), compute_uv=False).max() <= 1.305


@not_on_fake
@pytest.mark.parametrize("family", INPUTS)
def test_reference_is_the_map_of_singular_values(family):
    g = FAMILIES[family]()
    u, s, v = np.linalg.svd(g, full_matrices=False)
    norm = np.linalg.norm(s, axis=-1, keepdims=True)
    s = np.divide(s, norm, out=np.zeros_like(s), where=norm > 0)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for method in ("standard", "gram"):
        got = reference.newton_schulz(g, method=method)
        assert error(got, u * s[..., None, :] @ v) <= 1e-9
        assert error(reference.newton_schulz(g, method="gram", restarts=(1, 3)), got) <= 1e-9


@everywhere
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_power_of_two_scale_leaves_every_bit(method):
    g = gauss(48, 80).astype(np.float32)
    want = newton_schulz(g, method=method)
    for exponent in (-100, -60, 1, 60, 120):
        got = newton_schulz(np.ldexp(g, exponent).astype(np.float32), method=method)
        assert np.array_equal(got, want)


@everywhere
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_zero_stays_zero(dtype):
    got = newton_schulz(np.zeros((2, 5, 7), NUMPY[dtype]))
    assert not as_float64(got).any()


@everywhere
@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_matrix(value, method, dtype):
    g = gauss(6, 33, 40).astype(NUMPY[dtype])
    g[4, 32, 39] = g[1, 0, 0] = value
    g[3] = 0
    got = newton_schulz(g, method=method)
    assert np.isnan(as_float64(got[[1, 4]])).all()
    for i in (0, 2, 3, 5):
        assert got[i].tobytes() == newton_schulz(g[i], method=method).tobytes()


@everywhere
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("family", [*(FEW if FAKE else INPUTS), "one pair differs"])
def test_transpose_gives_the_transposed_bits(family, dtype, method):
    if family == "one pair differs":
        g = np.ones((6, 6))
        g[4, 5] = 2
    else:
        g = INPUTS[family] / (np.abs(INPUTS[family]).max() or 1)
    g = g.astype(NUMPY[dtype])
    got = newton_schulz(g, method=method)
    view = newton_schulz(g.swapaxes(-1, -2), method=method)
    copy = newton_schulz(np.ascontiguousarray(g.swapaxes(-1, -2)), method=method)
    assert np.array_equal(view, got.swapaxes(-1, -2)) and np.array_equal(copy, view)


@not_on_fake
@pytest.mark.parametrize("shape", [(400, 700), (700, 400), (500, 500), (9, 60, 90), (3, 450, 450)])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_number_of_threads_changes_no_bit(shape, method):
    g = gauss(*shape).astype(np.float32)
    before = fusedopt.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            fusedopt.set_num_threads(threads)
            results.append(fusedopt.newton_schulz(g, method=method).tobytes())
    finally:
        fusedopt.set_num_threads(before)
    assert len(set(results)) == 1
    if len(shape) == 3:
        alone = [fusedopt.newton_schulz(x, method=method).tobytes() for x in g]
        assert b"".join(alone) == results[0]


@not_on_fake
def test_calls_from_several_threads():
    inputs = [gauss(2, 40 + i, 90, seed=i).astype(np.float32) for i in range(16)]
    want = [fusedopt.newton_schulz(g) for g in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(fusedopt.newton_schulz, inputs), want, strict=True):
            assert np.array_equal(got, expected)


STRIDED = {
    "permuted": lambda g: g.permute(2, 0, 1),
    "steps": lambda g: g[::2, ::3, 1::2],
    "expanded": lambda g: g[:1].expand(5, -1, -1),
    "repeated rows": lambda g: g[:, :1].expand(-1, 7, -1),
    "channels-last": lambda g: g[None].contiguous(memory_format=torch.channels_last),
}


@everywhere
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_any_strides_are_read(layout, dtype):
    base = torch.from_numpy(gauss(8, 30, 40)).to(where.device, TORCH[dtype])
    before = base.clone()
    g = STRIDED[layout](base)
    got = fusedopt.newton_schulz(g)
    assert got.shape == g.shape and got.is_contiguous()
    assert torch.equal(got, fusedopt.newton_schulz(g.contiguous()))
    assert torch.equal(base, before)


@not_on_fake
def test_reversed_numpy_views_and_unaligned_memory():
    g = gauss(20, 30).astype(np.float32)
    assert np.array_equal(
        fusedopt.newton_schulz(g[::-1, ::-1]), fusedopt.newton_schulz(g[::-1, ::-1].copy())
    )
    shifted = np.frombuffer(bytearray(4 + g.nbytes), np.float32, g.size, 4).reshape(g.shape)
    shifted[...] = g
    assert np.array_equal(fusedopt.newton_schulz(shifted), fusedopt.newton_schulz(g))


@everywhere
def test_read_only_input_and_parameters():
    g = gauss(5, 6).astype(np.float32)
    want = newton_schulz(g)
    if not on_gpu():
        g.flags.writeable = False
        assert np.array_equal(fusedopt.newton_schulz(g), want)
    parameter = torch.nn.Parameter(as_tensor(g.copy()))
    got = fusedopt.newton_schulz(parameter)
    assert type(got) is torch.Tensor and not got.requires_grad
    assert np.array_equal(got.cpu().numpy(), want) and parameter._version == 0


@not_on_fake
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_and_tiny_shapes(shape, backend):
    got = fusedopt.newton_schulz(np.ones(shape, np.float32), backend=backend)
    assert got.shape == shape and np.isfinite(got).all()


class OnlyDLPack:
    """An array of a library that has nothing else."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class WithNamespace(OnlyDLPack):
    def __array_namespace__(self):
        return np


@not_on_fake
def test_dlpack_arrays():
    g = gauss(5, 6).astype(np.float32)
    for array in (OnlyDLPack(g), WithNamespace(g)):
        got = fusedopt.newton_schulz(array)
        assert type(got) is np.ndarray and np.array_equal(got, fusedopt.newton_schulz(g))


@everywhere
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "coefficients", [*SETS, (1.5, -0.5, 0.0), [(2.0, -1.5, 0.5)], [(3, -4, 1.5), (1.5, -0.5, 0)]]
)
def test_schedules(coefficients, steps, method):
    """One step, fewer and more than a list has; a cubic step among quintic ones; restarts."""
    if isinstance(coefficients, list) and len(coefficients) > steps:
        pytest.skip("more triples than steps are refused")
    g = with_spectrum(np.linspace(1, 0.2, 30), 70)
    want = reference.newton_schulz(g, coefficients=coefficients, steps=steps)
    options = {"coefficients": coefficients, "steps": steps, "method": method}
    for restarts in [None, *([(1,), (1, steps - 1)] if steps > 1 else [])]:
        got = newton_schulz(g.astype(np.float32), restarts=restarts, **options)
        assert error(got, want) <= 2e-5
        assert error(newton_schulz(g, restarts=restarts, **options), want) <= 1e-13


@not_on_fake
def test_coefficient_sets_are_the_published_ones():
    triples = {name: schedules.make(name, 9, "auto", "float32", "float32").steps for name in SETS}
    assert triples["jordan"] == 9 * ((3.4445, -4.7750, 2.0315, False),)
    polar = triples["polar_express"]
    first = (8.287212 / 1.01, -23.595887 / 1.01**3, 17.300387 / 1.01**5)
    assert polar[0][:3] == pytest.approx(first)
    assert polar[6][0] == pytest.approx(1.8750015 / 1.01)
    assert polar[7] == polar[8] == (1.875, -1.25, 0.375, False)
    assert triples["you"][8] == (2.8366, -3.0525, 1.2012, False)
    assert {step[2] for step in triples["cubic"]} == {0.0}


@not_on_fake
def test_restarts_stand_where_half_precision_needs_them():
    def made(name, arithmetic, steps=5, **options):
        schedule = schedules.make(name, steps, "gram", "float16", arithmetic, **options)
        return schedule.arithmetic, [i for i, step in enumerate(schedule.steps) if step[3]]

    assert made("jordan", "float16") == made((3.4445, -4.7750, 2.0315), "float16")
    assert made("jordan", "float16") == ("float16", [1, 3])
    for name, arithmetic in [("polar_express", "float16"), ("jordan", "bfloat16")]:
        assert made(name, arithmetic) == ("float32", [])
        assert made(name, arithmetic, restarts=(1, 3)) == (arithmetic, [1, 3])
    assert made("jordan", "float16", steps=6) == ("float32", [])
    assert made("jordan", "float32") == ("float32", [])
    assert made("jordan", "bfloat16", diagonals_apart=True) == ("bfloat16", [1, 3])
    assert made("you", "bfloat16", diagonals_apart=True) == ("bfloat16", [2, 4])
    assert made("jordan", "float16", diagonals_apart=True) == ("float32", [])


@not_on_fake
def test_auto_by_aspect():
    """From which aspect on it takes the Gram form, by what products read and write."""

    def gram_from(name, dtype, arithmetic, steps=5):
        return schedules.make(name, steps, "auto", dtype, arithmetic).gram_from

    assert gram_from("jordan", "bfloat16", "float32") == 1.5
    assert gram_from("jordan", "float16", "float16") == 2
    for given in [
        ("jordan", "bfloat16", "bfloat16"),
        ("jordan", "float16", "float16", 6),
        ("you", "float16", "float16"),
        ("polar_express", "float16", "float16"),
        ("jordan", "float32", "float32"),
        ("jordan", "float64", "float64"),
    ]:
        assert gram_from(*given) == np.inf, given


@not_on_fake
def test_auto_takes_the_gram_form_only_beside_a_coarser_rounding():
    long, short = torch.from_numpy(gauss(64, 96)), torch.from_numpy(gauss(64, 95))
    for dtype, g, method in [
        (torch.bfloat16, long, "gram"),
        (torch.float16, long, "gram"),
        (torch.bfloat16, short, "standard"),
        (torch.float32, long, "standard"),
        (torch.float64, long, "standard"),
    ]:
        for x, options in ((g.to(dtype), {}), (g, {"dtype": dtype})):
            got = fusedopt.newton_schulz(x, **options)
            assert torch.equal(got, fusedopt.newton_schulz(x, method=method, **options))


@not_on_fake
def test_agrees_with_torch_muon():
    """torch's own in bf16, whose rounding is what separates them."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    g = torch.from_numpy(gauss(96, 160).astype(np.float32))
    theirs = _zeropower_via_newtonschulz(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = fusedopt.newton_schulz(g, dtype=torch.bfloat16)
    assert error(as_float64(ours), as_float64(theirs)) <= 0.03


ERRORS = [
    (
        {"G": np.ones(3, np.float32)},
        ValueError,
        r"G \(shape \(3,\), float32\): expected at least two",
    ),
    ({"G": np.ones((3, 3), np.int64)}, TypeError, r"G \(shape \(3, 3\), int64\): expected float32"),
    ({"G": np.ones((3, 3), np.complex64)}, TypeError, r"G .*complex64.*expected float32"),
    ({"G": "text"}, TypeError, "G"),
    ({"steps": 0}, ValueError, "steps is 0, expected"),
    ({"steps": 2.5}, TypeError, "steps is 2.5, expected"),
    ({"coefficients": "muon"}, ValueError, "coefficients is 'muon', expected one of jordan"),
    ({"coefficients": [(1, 2)]}, ValueError, r"coefficients is \[\(1, 2\)\], expected"),
    ({"coefficients": []}, ValueError, r"coefficients is \[\], expected"),
    ({"coefficients": (1.0, np.nan, 0.0)}, ValueError, "coefficients is .*nan"),
    ({"coefficients": 6 * [(1, 0, 0)]}, ValueError, "coefficients has 6 triples for 5 steps"),
    ({"method": "fast"}, ValueError, "method is 'fast', expected one of standard, gram, auto"),
    ({"dtype": "int8"}, ValueError, "dtype is 'int8', expected one of float32"),
    ({"restarts": (0,)}, ValueError, r"restarts is \(0,\), expected steps from 1 to 4"),
    ({"backend": "cuda"}, (RuntimeError, ValueError), "backend 'cuda'"),
    ({"backend": "triton"}, (RuntimeError, ValueError), "backend 'triton'"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of cpu"),
    ({"stream": 3}, ValueError, "stream is 3, expected None"),
]


@not_on_fake
@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=str)
def test_errors_say_what_to_do(arguments, kind, message):
    options = {"G": np.ones((3, 4), np.float32), **arguments}
    with pytest.raises(kind, match=message):
        fusedopt.newton_schulz(options.pop("G"), **options)


@not_on_fake
def test_supports():
    assert fusedopt.supports("newton_schulz", "cpu", dtypes=["bfloat16", np.float64]) == (True, "")
    assert not fusedopt.supports("newton_schulz", "cpu", dtypes=["int32"])[0]
    for backend in ("cpu", "reference", "cuda"):
        assert backend in OPERATION.launchers
