"""Muon and NorMuon in float64 NumPy: what every backend is tested against."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedopt.partitions import Matrix, Partition, matrices, per_tensor
from fusedopt.references._shared import Array, each
from fusedopt.references.newton_schulz import newton_schulz

EPS = 1e-10  # of NorMuon, beside a root and beside a norm


class MuonResult(NamedTuple):
    """New arrays, in the order of the arguments."""

    params: list[NDArray[np.float64]]
    momentum_buffers: list[NDArray[np.float64]]


class NorMuonResult(NamedTuple):
    """New arrays, in the order of the arguments; ``row_sqs`` are 1-d."""

    params: list[NDArray[np.float64]]
    momentum_buffers: list[NDArray[np.float64]]
    row_sqs: list[NDArray[np.float64]]


def muon_step(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike | None],
    momentum_buffers: Sequence[ArrayLike],
    **options: Any,
) -> MuonResult:
    """One step of Muon as a pure function.

    Options as ``fusedopt.muon_step``'s, except those that say how Newton–Schulz is computed: here
    it is always the plain iteration, in float64. A gradient may be None: that tensor keeps all it
    has.

    Source: Jordan 2024; ``torch.optim.Muon``.
    """
    return MuonResult(*_step(params, grads, momentum_buffers, None, **options)[:2])


def normuon_step(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike | None],
    momentum_buffers: Sequence[ArrayLike],
    row_sqs: Sequence[ArrayLike],
    **options: Any,
) -> NorMuonResult:
    """One step of NorMuon as a pure function; options as ``fusedopt.normuon_step``'s.

    Source: Li et al., arXiv:2510.05491, in the form of the released code.
    """
    return NorMuonResult(*_step(params, grads, momentum_buffers, row_sqs, **options))


def _step(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike | None],
    momentum_buffers: Sequence[ArrayLike],
    row_sqs: Sequence[ArrayLike] | None,
    *,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float | Sequence[float] = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Any = "jordan",
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    momentum_form: str = "ema",
    cautious_weight_decay: bool = False,
    maximize: bool = False,
    partitions: Partition | Sequence[Partition] = "tensor",
    grad_scale: float | None = None,
    found_inf: float | None = None,
    beta2: float = 0.95,
    axis: str = "row",
) -> tuple[list[Array], list[Array], list[Array]]:
    count = len(params)
    rates, decays = each(lr, count), each(weight_decay, count)
    kinds = per_tensor(partitions, count)
    sign = (-1.0 if maximize else 1.0) / (grad_scale or 1.0)
    new_params = [np.array(p, np.float64) for p in params]
    buffers = [np.array(m, np.float64) for m in momentum_buffers]
    statistics = [np.array(v, np.float64).reshape(-1) for v in row_sqs or []]
    for i, grad in enumerate(grads):
        if grad is None or found_inf:
            continue
        g = sign * np.asarray(grad, np.float64)
        keep = 1.0 if momentum_form == "sum" else 1 - momentum
        buffers[i] = momentum * buffers[i] + keep * g
        u = (momentum * buffers[i] + keep * g if nesterov else buffers[i]).reshape(-1)
        line = 0
        update: Array = np.zeros(u.size)
        for matrix in matrices(kinds[i], g.shape):
            o = newton_schulz(_view(u, matrix), coefficients=ns_coefficients, steps=ns_steps)
            if row_sqs is not None:
                lines = _by_column(matrix, axis)
                size = o.shape[lines]
                o, statistics[i][line : line + size] = _normalize(
                    o, statistics[i][line : line + size], lines, beta2
                )
                line += size
            _view(update, matrix)[...] = o * lr_factor(matrix, adjust_lr_fn)
        update = update.reshape(g.shape)
        decay = 1 - rates[i] * decays[i]
        p = new_params[i]
        decayed = np.where(update * p >= 0, p * decay, p) if cautious_weight_decay else p * decay
        new_params[i] = decayed - rates[i] * update
    return new_params, buffers, statistics


def lr_factor(matrix: Matrix, adjust_lr_fn: str | None) -> float:
    """What ``adjust_lr_fn`` multiplies the learning rate by."""
    if adjust_lr_fn in (None, "original"):
        return sqrt(max(1.0, matrix.outputs / matrix.inputs))
    if adjust_lr_fn in ("match_rms_adamw", "rms_norm"):
        return 0.2 * sqrt(max(matrix.outputs, matrix.inputs))
    return sqrt(matrix.outputs / matrix.inputs) if adjust_lr_fn == "spectral" else 1.0


def _view(flat: Array, matrix: Matrix) -> Array:
    item = flat.itemsize
    shape, strides = (matrix.rows, matrix.columns), (matrix.stride * item, item)
    return np.lib.stride_tricks.as_strided(flat[matrix.offset :], shape, strides)


def _by_column(matrix: Matrix, axis: str) -> int:
    """The axis of the stored matrix that counts NorMuon's statistics."""
    if axis == "short" and matrix.rows != matrix.columns:
        return int(matrix.columns > matrix.rows)
    return int(matrix.transposed)


def _normalize(o: Array, v: Array, lines: int, beta2: float) -> tuple[Array, Array]:
    across = 1 - lines
    v = beta2 * v + (1 - beta2) * np.mean(o * o, axis=across)
    scaled = o / np.expand_dims(np.sqrt(v) + EPS, across)
    return scaled * (np.linalg.norm(o) / (np.linalg.norm(scaled) + EPS)), v
