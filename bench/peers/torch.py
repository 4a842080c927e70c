"""torch's own optimizers: the plain loop, the foreach and the fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from bench.peers import (
    MatrixFunctionPeer,
    MuonPeer,
    NamedOptimizerPeer,
    OptimizerPeer,
    require_parameter_dtype,
)

JORDAN = (3.4445, -4.7750, 2.0315)


def _adamw(name: str, **mode: Any) -> OptimizerPeer:
    def build(params: list[Parameter], state_dtype: torch.dtype, options: dict[str, Any]) -> Any:
        require_parameter_dtype(params, state_dtype)
        return torch.optim.AdamW(params, **options, **mode)

    return OptimizerPeer(f"torch {name}", build)


def adamw() -> list[OptimizerPeer]:
    """``torch.optim.AdamW`` in its three implementations."""
    return [
        _adamw("loop", foreach=False),
        _adamw("foreach", foreach=True),
        _adamw("fused", fused=True),
    ]


def blockwise_adam() -> list[NamedOptimizerPeer]:
    """Its fused AdamW, for scale."""
    peer = _adamw("fused", fused=True)
    return [
        NamedOptimizerPeer(peer.name, lambda named, *rest: peer.build([p for _, p in named], *rest))
    ]


def newton_schulz() -> list[MatrixFunctionPeer]:
    """torch.optim.Muon's own, and Jordan's five lines in two precisions, as they are and compiled.

    Muon's takes one matrix at a time.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    def muon(g: torch.Tensor) -> torch.Tensor:
        matrices = g.reshape(-1, *g.shape[-2:])
        return torch.stack([_zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7) for x in matrices])

    return [
        MatrixFunctionPeer("torch Muon's", muon, "bf16"),
        MatrixFunctionPeer("torch plain fp32", _five_lines, "fp32"),
        MatrixFunctionPeer("torch plain bf16", lambda g: _five_lines(g.bfloat16()), "bf16"),
        MatrixFunctionPeer("torch.compile fp32", torch.compile(_five_lines), "fp32"),
    ]


def newton_schulz_gpu() -> list[MatrixFunctionPeer]:
    """Muon's own, and Jordan's five lines in bfloat16, as they are and compiled."""
    compiled = torch.compile(_five_lines)
    return [
        newton_schulz()[0],
        MatrixFunctionPeer("torch plain bf16", lambda g: _five_lines(g.bfloat16()), "bf16"),
        MatrixFunctionPeer("torch.compile bf16", lambda g: compiled(g.bfloat16()), "bf16"),
    ]


def muon() -> list[MuonPeer]:
    """``torch.optim.Muon``, and its fused AdamW for all else."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError("torch before 2.9 has no Muon")

    def build(
        matrices: list[Parameter],
        others: list[Parameter],
        hyper: dict[str, Any],
        adamw: dict[str, Any],
    ) -> Callable[[], object]:
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, **hyper)]
        if others:
            optimizers.append(torch.optim.AdamW(others, **adamw, fused=True))

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        return step

    return [MuonPeer("torch", build, "bf16")]


def _five_lines(g: torch.Tensor) -> torch.Tensor:
    a, b, c = JORDAN
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.size(-2) > g.size(-1) else x
