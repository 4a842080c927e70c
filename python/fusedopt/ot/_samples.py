"""Transport between point clouds: costs from coordinates, POT's and geomloss's calling styles."""

from collections.abc import Callable
from typing import Any

from fusedopt.ot._solve import OTResult, namespace, pick, solve

Metric = str | Callable[[Any, Any], Any]


def _squares(x: Any, y: Any) -> Any:
    return sum((x[..., :, None, k] - y[..., None, :, k]) ** 2 for k in range(x.shape[-1]))


def _lengths(x: Any, y: Any) -> Any:
    """Square roots whose derivative at zero is zero."""
    squares, numbers = _squares(x, y), namespace(x)
    apart = squares > 0
    return numbers.sqrt(numbers.where(apart, squares, 1.0)) * apart


def _cityblock(x: Any, y: Any) -> Any:
    return sum(abs(x[..., :, None, k] - y[..., None, :, k]) for k in range(x.shape[-1]))


def _cosine(x: Any, y: Any) -> Any:
    x, y = (each / (each**2).sum(-1)[..., None] ** 0.5 for each in (x, y))
    return 1 - x @ y.swapaxes(-1, -2)


METRICS: dict[str, Callable[[Any, Any], Any]] = {
    "sqeuclidean": _squares,
    "euclidean": _lengths,
    "cityblock": _cityblock,
    "cosine": _cosine,
}


def dist(x1: Any, x2: Any = None, metric: Metric = "sqeuclidean") -> Any:
    """Costs between the points ``x1`` ``(..., n, d)`` and ``x2`` ``(..., m, d)``, as ``ot.dist``.

    ``metric``: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"``, ``"cosine"``, or a function of
    both clouds. 1-D arrays are points on a line.
    """
    x2 = x1 if x2 is None else x2
    x1, x2 = (x[:, None] if x.ndim == 1 else x for x in (x1, x2))
    if x1.shape[-1] != x2.shape[-1]:
        raise ValueError(f"points have {x1.shape[-1]} and {x2.shape[-1]} coordinates")
    if callable(metric):
        return metric(x1, x2)
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    return METRICS[metric](x1, x2)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    metric: Metric = "sqeuclidean",
    reg: Any = None,
    **options: Any,
) -> Any:
    """Transport between two point clouds ``(n, d)`` and ``(m, d)``, as ``ot.solve_sample``.

    Clouds may be batches ``(problems, n, d)`` or lists. The cost matrix is formed: for clouds of a
    few thousand points. ``options`` and the result as in ``solve``.
    """
    if isinstance(X_a, list | tuple):
        if len(X_a) != len(X_b):
            raise ValueError(f"X_a has {len(X_a)} entries, X_b has {len(X_b)}")
        return [
            solve_sample(
                *(x, y, pick("a", a, i), pick("b", b, i)),
                metric,
                pick("reg", reg, i),
                **options,
            )
            for i, (x, y) in enumerate(zip(X_a, X_b, strict=True))
        ]
    return solve(dist(X_a, X_b, metric), a, b, reg, **options)


def sinkhorn_divergence(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: Any,
    metric: Metric = "sqeuclidean",
    **options: Any,
) -> Any:
    """``value(a, b) − value(a, a)/2 − value(b, b)/2``: zero for equal clouds, never negative.

    Arguments as in ``solve_sample``, for clouds of mass 1 (Feydy et al., arXiv:1810.08278).
    """

    def value(x: Any, y: Any, first: Any, second: Any) -> Any:
        result: OTResult = solve_sample(x, y, first, second, metric, reg, **options)
        return result.value

    return value(X_a, X_b, a, b) - (value(X_a, X_a, a, a) + value(X_b, X_b, b, b)) / 2


class SamplesLoss:
    """geomloss's ``SamplesLoss("sinkhorn")``: a loss between point clouds.

    Cost ``|x − y|^p / p``, ``reg = blur^p``. Call it with ``(x, y)`` or ``(a, x, b, y)``; clouds
    are ``(n, d)``, or ``(problems, n, d)`` for one loss each.

    Args:
        loss: ``"sinkhorn"``.
        p: 1 or 2.
        blur: the length below which points are not told apart.
        debias: the divergence; otherwise the entropic cost itself.
        scaling: geomloss's trade of accuracy for speed, taken for its callers' sake: the answer
            here is converged in any case.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        *,
        debias: bool = True,
        scaling: float = 0.5,
    ) -> None:
        if loss != "sinkhorn":
            raise ValueError(f"loss is {loss!r}, expected 'sinkhorn'")
        if p not in (1, 2):
            raise ValueError(f"p is {p!r}, expected 1 or 2")
        self.p, self.blur, self.debias = p, blur, debias

    def __call__(self, *arrays: Any) -> Any:
        if len(arrays) not in (2, 4):
            raise TypeError(f"got {len(arrays)} arrays, expected (x, y) or (a, x, b, y)")
        a, x, b, y = arrays if len(arrays) == 4 else (None, arrays[0], None, arrays[1])

        def cost(x: Any, y: Any) -> Any:
            return METRICS["euclidean"](x, y) if self.p == 1 else METRICS["sqeuclidean"](x, y) / 2

        reg = self.blur**self.p
        if self.debias:
            return sinkhorn_divergence(x, y, a, b, reg=reg, metric=cost)
        return solve_sample(x, y, a, b, cost, reg).value
