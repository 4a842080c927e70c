"""Newton–Schulz with products of bfloat16 (AVX512-BF16), its instructions spelled out in C++.

The contract of ``test_newton_schulz.py`` holds for it too, and any CPU with AVX2 can run this.
"""

import ctypes

import ml_dtypes
import numpy as np
import pytest
from test_isa import AVX2, TWIN, build_library, x86_only
from test_newton_schulz import INPUTS, SETS, error, plain_error, ulp

import fusedopt
from fusedopt import _C, reference
from fusedopt import _newton_schulz_schedule as schedules
from where import not_on_fake

pytestmark = [not_on_fake, x86_only]
BF16 = np.dtype(ml_dtypes.bfloat16)
FORMS = {"standard": 0, "gram": 1}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    flags = ["-O2", *AVX2, *TWIN, "-DFUSEDOPT_PACK_BYTES=64", "-DFUSEDOPT_TARGET=avx512_bf16"]
    sources = ["csrc/cpu/newton_schulz.cpp", "tests/isa/newton_schulz_entry.cpp"]
    own = {source: [*flags, "-D__AVX512BF16__"] for source in sources}
    return build_library(own | {"csrc/cpu/threads.cpp": []}, tmp_path_factory.mktemp("bf16"))


def run(library, g, coefficients="jordan", form="standard", threads=1, out=None):
    """Every matrix of a bfloat16 array."""
    schedule = schedules.make(coefficients, 5, form, "bfloat16", "bfloat16", diagonals_apart=True)
    assert schedule.arithmetic == "bfloat16"
    steps = schedule.steps
    numbers = np.array(steps, np.float64)
    result = np.empty_like(g) if out is None else out
    for index in np.ndindex(g.shape[:-2]):
        matrix = np.ascontiguousarray(g[index])
        library.newton_schulz_of_bfloat16(
            *(ctypes.c_void_p(x.ctypes.data) for x in (matrix, result[index])),
            *(ctypes.c_int64(size) for size in matrix.shape),
            ctypes.c_void_p(numbers.ctypes.data),
            ctypes.c_int64(len(steps)),
            FORMS[form],
            threads,
        )
    return result


def bits(x):
    return x.view(np.uint16)


@pytest.mark.parametrize("coefficients", SETS)
@pytest.mark.parametrize("family", INPUTS)
def test_error_is_at_most_twice_the_plain_formulas(library, family, coefficients):
    g = (INPUTS[family] / (np.abs(INPUTS[family]).max() or 1)).astype(BF16)
    exact = g.astype(np.float64)
    want = reference.newton_schulz(exact, coefficients=coefficients)
    bound = 2 * plain_error(exact, coefficients, want, dtype="bfloat16") + ulp("bfloat16")
    for form in FORMS:
        got = run(library, g, coefficients, form)
        assert error(got.astype(np.float64), want) <= bound, form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["wide", "tall", "square", "symmetric", "37 x 101", "1001 x 3"])
def test_transposed_input_gives_the_transposed_bits(library, family, form):
    g = INPUTS[family].astype(BF16)
    turned = run(library, np.ascontiguousarray(g.T), form=form)
    assert np.array_equal(bits(run(library, g, form=form)), bits(np.ascontiguousarray(turned.T)))


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_scales_make_no_difference(library, form):
    g = INPUTS["aspect 4, two slices deep"].astype(BF16)
    alone = run(library, g, form=form)
    assert np.array_equal(bits(alone), bits(run(library, g, form=form, threads=3)))
    for exponent in (-90, 90):
        scaled = np.ldexp(g.astype(np.float32), exponent).astype(BF16)
        assert np.array_equal(bits(alone), bits(run(library, scaled, form=form)))


@pytest.mark.parametrize("form", FORMS)
def test_nan_gives_nan_and_zero_gives_zero(library, form):
    g = np.zeros((3, 20, 30), BF16)
    g[1] = INPUTS["batch"][0, 0].astype(BF16)
    g[2, 3, 4] = np.inf
    got = run(library, g, form=form).astype(np.float64)
    assert np.array_equal(got[0], np.zeros((20, 30))) and np.isnan(got[2]).all()
    assert np.isfinite(got[1]).all() and np.abs(got[1]).max() > 0


@pytest.mark.skipif("avx512_bf16" not in _C.available_isas(), reason="no AVX512-BF16 here")
@pytest.mark.parametrize("coefficients", SETS)
def test_the_instruction_itself(coefficients):
    before = _C.isa()
    _C.set_isa("avx512_bf16")
    try:
        for family, values in INPUTS.items():
            g = (values / (np.abs(values).max() or 1)).astype(BF16)
            exact = g.astype(np.float64)
            want = reference.newton_schulz(exact, coefficients=coefficients)
            plain = plain_error(exact, coefficients, want, dtype="bfloat16")
            for form in FORMS:
                got = fusedopt.newton_schulz(g, coefficients=coefficients, method=form)
                assert error(got.astype(np.float64), want) <= 2 * plain + ulp("bfloat16"), family
    finally:
        _C.set_isa(before)
