"""Float64 NumPy references under the names of the functional steps: pure, returning new arrays."""

from fusedopt.references.adamw import AdamWResult, adamw_step

__all__ = ["AdamWResult", "adamw_step"]
