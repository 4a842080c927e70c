"""Fused optimizer kernels for CPU and GPU, without libtorch.

Functional steps (``adamw_step``) update arrays of torch, NumPy or any DLPack library in place;
``fusedopt.optim`` has ``torch.optim``-style classes; ``fusedopt.reference`` the float64 truth.
"""

import importlib
import importlib.metadata
import os
from typing import Any

from fusedopt import _C, ot, partitions, reference
from fusedopt._env import env
from fusedopt._threads import get_num_threads, set_num_threads
from fusedopt.backends import supports
from fusedopt.steps.adamw import adamw_step
from fusedopt.steps.blockwise_adam import blockwise_adam_step
from fusedopt.steps.muon import muon_step, normuon_step
from fusedopt.steps.newton_schulz import newton_schulz
from fusedopt.steps.sinkhorn_knopp import sinkhorn_knopp
from fusedopt.steps.sinkhorn_newton_sparse import (
    sinkhorn_newton_sparse,
    sinkhorn_step,
    sns_newton_step,
)

__all__ = [
    "adamw_step",
    "blockwise_adam_step",
    "env",
    "get_num_threads",
    "muon_step",
    "newton_schulz",
    "normuon_step",
    "optim",
    "ot",
    "param_groups_for",
    "partitions",
    "reference",
    "set_num_threads",
    "sinkhorn_knopp",
    "sinkhorn_newton_sparse",
    "sinkhorn_step",
    "sns_newton_step",
    "supports",
]

__version__: str = importlib.metadata.version("fusedopt")

if _C.__version__ != __version__:
    raise ImportError(
        f"fusedopt is version {__version__}, but its extension module was built as "
        f"{_C.__version__}; build it again: pip install ."
    )
if "FUSEDOPT_ISA" in os.environ:
    _C.set_isa(os.environ["FUSEDOPT_ISA"])


def __getattr__(name: str) -> Any:
    if name == "optim":  # needs torch, which the package itself does not
        return importlib.import_module("fusedopt.optim")
    if name == "param_groups_for":  # so does this
        return importlib.import_module("fusedopt._param_groups").param_groups_for
    raise AttributeError(f"module 'fusedopt' has no attribute {name!r}")
