"""Newton–Schulz's schedule as data: the one place that knows coefficients, restarts and methods."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fusedopt import _C

Triple = tuple[float, float, float]

# Amsel et al., arXiv:2505.16932, Algorithm 1: lower bound 1e-3, cushion 0.02407327424182761.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # without it rounding alone can push singular values beyond where the steps converge

# A step beyond a list's end repeats its last triple.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "cubic": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
}

METHODS = ("standard", "gram", "auto")
DTYPES = ("float32", "float64", "bfloat16", "float16")

_HALF = ("bfloat16", "float16")

# Where the Gram form holds in half precision, and the steps, counting from 0, before which it
# computes X anew: at most two whose error, emulated over the inputs of the numerics contract at
# several shapes, is at most twice the standard form's beside one rounding of the result (three
# times on positive-mean, rank-1 and all-ones matrices, these by the worst of 30 shapes). With
# everything rounded none were found for bfloat16, nor for the other coefficients: one coherent
# rounding of the Gram matrix is too much for them. float32 needs no restart.
_GRAM_RESTARTS: dict[tuple[str, str], tuple[int, ...]] = {("jordan", "float16"): (1, 3)}
# The same where the squares' diagonals stay in float32, as on CPUs that multiply bfloat16.
_GRAM_RESTARTS_APART: dict[tuple[str, str], tuple[int, ...]] = {
    ("jordan", "bfloat16"): (1, 3),
    ("polar_express", "bfloat16"): (1, 3),
    ("you", "bfloat16"): (2, 4),
    ("cubic", "bfloat16"): (1, 3),
}
_GRAM_STEPS = 5  # that they were tried with

# The aspect from which "auto" takes the Gram form: where products in half precision allow it, and
# where wider ones do and the input is rounded to half precision anyway, beside which the Gram
# form's own error in float32 is nothing.
_GRAM_FROM_HALF = 2.0
_GRAM_FROM = 1.5


class Schedule(NamedTuple):
    """What every backend executes; ``csrc/common/newton_schulz.h`` says what the fields mean."""

    steps: tuple[tuple[float, float, float, bool], ...]
    gram_from: float
    dtype: str
    arithmetic: str

    def compiled(self) -> _C.NewtonSchulzSchedule:
        """The same for the extension module."""
        return _C.NewtonSchulzSchedule(*self)


def arithmetic(backend: str, dtype: str) -> str:
    """The dtype of what a backend's products read and write, of inputs rounded to ``dtype``."""
    if backend in ("cuda", "triton") or dtype == "float64":
        return dtype
    in_bfloat16 = dtype == "bfloat16" and _C.isa() == "avx512_bf16" and backend == "cpu"
    return dtype if in_bfloat16 else "float32"


def make(
    coefficients: str | Sequence[Any],
    steps: int,
    method: str,
    dtype: str,
    arithmetic: str,
    restarts: Sequence[int] | None = None,
    *,
    diagonals_apart: bool = False,
) -> Schedule:
    """The checked schedule.

    Args:
        coefficients, steps, method, restarts: as in ``newton_schulz``.
        dtype: what the input is rounded to.
        arithmetic: the dtype of what the backend's products read and write. The Gram form in half
            precision becomes one in float32 where its accuracy there is not known, unless restarts
            are given.
        diagonals_apart: of the backend's squares in half precision, in float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps is {steps!r}, expected a whole number >= 1")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected a whole number >= 1")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    triples = _triples(coefficients, steps)
    half = arithmetic in _HALF
    proven = _proven_restarts(triples, arithmetic, diagonals_apart)
    if restarts is not None:
        if any(not 0 < r < steps for r in restarts):
            raise ValueError(f"restarts is {restarts!r}, expected steps from 1 to {steps - 1}")
    elif half and method == "gram" and not proven:
        arithmetic, restarts = "float32", ()
    else:
        restarts = proven
    from_aspect = {"standard": math.inf, "gram": 0.0, "auto": math.inf}
    if half and proven:
        from_aspect["auto"] = _GRAM_FROM_HALF
    elif dtype in _HALF and not half:
        from_aspect["auto"] = _GRAM_FROM
    return Schedule(
        tuple((*triple, i in restarts) for i, triple in enumerate(triples)),
        from_aspect[method],
        dtype,
        arithmetic,
    )


def _proven_restarts(triples: list[Triple], arithmetic: str, apart: bool) -> tuple[int, ...]:
    """Empty where none are known, or none needed."""
    for (name, dtype), restarts in (_GRAM_RESTARTS_APART if apart else _GRAM_RESTARTS).items():
        if dtype == arithmetic and triples == _triples(name, _GRAM_STEPS):
            return restarts
    return ()


def _triples(coefficients: str | Sequence[Any], steps: int) -> list[Triple]:
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = ", ".join(COEFFICIENTS)
            raise ValueError(
                f"coefficients is {coefficients!r}, expected one of {known} or triples"
            )
        known_triples = COEFFICIENTS[coefficients]
    else:
        known_triples = _given(coefficients)
        if len(known_triples) > steps:
            raise ValueError(f"coefficients has {len(known_triples)} triples for {steps} steps")
    return [known_triples[min(i, len(known_triples) - 1)] for i in range(steps)]


def _given(coefficients: Sequence[Any]) -> tuple[Triple, ...]:
    """A list of triples, or one triple for all steps."""
    try:
        entries = list(coefficients)
        if entries and not hasattr(entries[0], "__len__"):
            entries = [entries]
        triples = tuple((float(a), float(b), float(c)) for a, b, c in entries)
    except (TypeError, ValueError):
        triples = ()
    if not triples or not all(math.isfinite(x) for triple in triples for x in triple):
        raise ValueError(
            f"coefficients is {coefficients!r}, expected a name, (a, b, c), or a list of (a, b, c)"
        )
    return triples
