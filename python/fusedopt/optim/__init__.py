"""Optimizers for torch, as drop-ins for ``torch.optim``."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fusedopt.optim needs torch, which is not installed: pip install fusedopt[torch]. "
        "The functional steps (fusedopt.adamw_step, ...) work without it."
    ) from error

from fusedopt.optim.adamw import AdamW
from fusedopt.optim.blockwise_adam import BlockwiseAdam
from fusedopt.optim.muon import Muon, NorMuon

__all__ = ["AdamW", "BlockwiseAdam", "Muon", "NorMuon"]
