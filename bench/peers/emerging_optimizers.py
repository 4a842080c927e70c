"""NVIDIA's Emerging-Optimizers, on a GPU."""

from __future__ import annotations

import torch

from bench.peers import MatrixFunctionPeer


def newton_schulz_gpu() -> list[MatrixFunctionPeer]:
    """float32 whose products may be in bfloat16, by its symmetric Triton kernel."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    def run(g: torch.Tensor) -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            result: torch.Tensor = newton_schulz(g.float(), 5, "simple", use_syrk=True)
        finally:
            torch.set_float32_matmul_precision(before)
        return result

    return [MatrixFunctionPeer("emerging-optimizers", run, "bf16")]
