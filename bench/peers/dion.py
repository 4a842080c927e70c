"""dion's Triton Newton–Schulz, on a GPU."""

from __future__ import annotations

from bench.peers import MatrixFunctionPeer


def newton_schulz_gpu() -> list[MatrixFunctionPeer]:
    """In bfloat16, with You's coefficients."""
    from dion.newton_schulz_triton import newton_schulz_triton

    return [MatrixFunctionPeer("dion", newton_schulz_triton, "bf16", "you")]
