"""Peers to compare with. Each file adapts one package and is optional.

A file has one function per algorithm it can take part in, named like the algorithm, which imports
the package and returns its peers; an ``ImportError`` makes it known as missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter


@dataclass(frozen=True)
class OptimizerPeer:
    """An optimizer class: how to make one, and under which keys it keeps its two states.

    ``build`` takes the parameters, the states' dtype and the hyperparameters of
    ``torch.optim.AdamW``, and raises ``NotImplementedError`` where the package can't do that. What
    it returns has a ``step()`` and a ``state``, whatever its type.
    """

    name: str
    build: Callable[[list[Parameter], torch.dtype, dict[str, Any]], Any]
    first: str = "exp_avg"
    second: str = "exp_avg_sq"


@dataclass(frozen=True)
class NamedOptimizerPeer:
    """An optimizer that goes by parameters' names; ``build`` takes (name, parameter) pairs."""

    name: str
    build: Callable[[list[tuple[str, Parameter]], torch.dtype, dict[str, Any]], Any]


@dataclass(frozen=True)
class MatrixFunctionPeer:
    """A function of one matrix or a batch of them; ``precision`` is what it computes in.

    ``coefficients``: by the names that ``fusedopt.newton_schulz`` has for them.
    """

    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    precision: str
    coefficients: str = "jordan"


@dataclass(frozen=True)
class MuonPeer:
    """Muon for matrices and AdamW for others; ``precision`` is what Newton–Schulz computes in.

    ``build`` takes both lists and the hyperparameters of both, and returns what takes a step.
    """

    name: str
    build: Callable[
        [list[Parameter], list[Parameter], dict[str, Any], dict[str, Any]], Callable[[], object]
    ]
    precision: str


@dataclass(frozen=True)
class TransportPeer:
    """A solver of optimal transport: ``solve(cost, a, b, reg, tol)`` returns the plan.

    ``exact``: it has no use for ``reg``. ``batched``: it takes many problems, and only those.
    ``compiles``: in its first call, for each shape.
    """

    name: str
    solve: Callable[[Any, Any, Any, float, float], Any]
    exact: bool = False
    batched: bool = False
    compiles: bool = False


def require_parameter_dtype(params: Sequence[Parameter], state_dtype: torch.dtype) -> None:
    """Refuse states of another dtype than the parameters."""
    if params[0].dtype != state_dtype:
        raise NotImplementedError("its states have the parameter's dtype")


def adapter_names() -> list[str]:
    """Names of the files in this folder."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def find(algorithm: str, wanted: Sequence[str] | None) -> tuple[list[Any], dict[str, str]]:
    """The peers of ``algorithm`` that are installed, and why the others are absent."""
    found: list[Any] = []
    missing: dict[str, str] = {}
    for name in adapter_names():
        adapter = importlib.import_module(f"{__name__}.{name}")
        if not hasattr(adapter, algorithm):
            continue
        if wanted is not None and name not in wanted:
            missing[name] = "left out by --peers or --quick"
            continue
        try:
            found += getattr(adapter, algorithm)()
        except ImportError as error:
            missing[name] = f"missing: {error}"
    return found, missing
