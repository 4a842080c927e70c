"""How many threads CPU kernels use."""

import os
import sys

_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set the number of threads of CPU kernels, for the whole process.

    Args:
        n: at least 1; ``None`` goes back to the default: torch's number where torch is loaded,
            else ``OMP_NUM_THREADS``, else the CPUs this process may run on.

    Raises:
        ValueError: ``n`` is below 1.
    """
    global _chosen
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n is {n!r}, expected a whole number >= 1 or None")
    _chosen = n


def get_num_threads() -> int:
    """The number of threads that the next CPU kernel will use at most."""
    if _chosen is not None:
        return _chosen
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))
