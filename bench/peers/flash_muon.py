"""flash-muon's Newton–Schulz, on a GPU."""

from __future__ import annotations

import torch

from bench.peers import MatrixFunctionPeer


def newton_schulz_gpu() -> list[MatrixFunctionPeer]:
    """In bfloat16; it takes one matrix at a time."""
    from flash_muon import fast_newtonschulz

    def run(g: torch.Tensor) -> torch.Tensor:
        return torch.stack([fast_newtonschulz(x) for x in g.reshape(-1, *g.shape[-2:])])

    return [MatrixFunctionPeer("flash-muon", run, "bf16")]
