"""The answer check before timing, with a bound derived from the plain formula's own error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHECKED_IN_FULL = 1 << 16  # elements of a tensor
_EDGE, _STRIDE = 1 << 12, 61  # of a larger one: both ends, and every 61st element (a prime)


def _picked(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= _CHECKED_IN_FULL:
        return flat
    return torch.cat([flat[:_EDGE], flat[_EDGE:-_EDGE:_STRIDE], flat[-_EDGE:]])


def pick(tensors: Sequence[Tensor]) -> Tensor:
    """Copy the checked elements of a list to one 1-D tensor, in logical order for any strides."""
    return torch.cat([_picked(tensor) for tensor in tensors])


def _ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of ``dtype`` around each ``value``."""
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.full_like(value, torch.finfo(dtype).eps / 2), exponent)


@dataclass(frozen=True)
class Expected:
    """What one list of arrays should hold: the float64 values and the error allowed for each."""

    what: str
    values: Tensor
    allowed: Tensor

    @classmethod
    def derive(cls, what: str, exact: Tensor, plain: Tensor) -> Expected:
        """Allow twice the largest error of ``plain``, the formula in its own dtype, and one ulp."""
        error = (plain.double() - exact).abs().max()
        return cls(what, exact, 2 * error + _ulp(exact, plain.dtype))

    def complaint(self, tensors: Sequence[Tensor]) -> str:
        """Empty if every checked element is within its bound, else what is wrong."""
        error = (pick(tensors).double() - self.values).abs()
        bad = ~(error <= self.allowed)
        if not bad.any():
            return ""
        worst = error.nan_to_num(torch.inf).max().item()
        share = 100 * bad.double().mean().item()
        return f"{share:.2g}% of {self.what} beyond the bound, worst error {worst:.1e}"
