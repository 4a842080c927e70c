"""Optimal transport's launch on a GPU: memory from torch, one launch, one look at what came out."""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedopt import _C, _gpu
from fusedopt.steps import _transport
from fusedopt.steps._transport import Problem

FACTS = 12  # as in csrc/cuda/sinkhorn_newton_sparse.h; the first 6 are those of the CPU
TRACE_ROWS = 2**21  # of a launch, 48 bytes each; a batch's problems share them


def launch_cuda(
    given: Problem, start: NDArray[Any] | None, tol: float, max_iter: int, method: str
) -> tuple[Any, Any, NDArray[Any], Any]:
    """f, g, facts and trace; all but the facts stay on the device."""
    torch = sys.modules["torch"]
    device = given.cost.device
    problems, n, m = given.shape

    def there(values: NDArray[Any]) -> Any:
        return torch.from_numpy(values).to(device)

    def empty(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.float64, device=device)

    f, facts = empty(problems, n), empty(problems, FACTS)
    g = empty(problems, m) if start is None else there(start)
    rows = min(max_iter, max(TRACE_ROWS // problems, 1))
    trace = empty(problems, rows, 6)
    workspace = torch.empty(
        _C.transport_gpu_workspace_bytes(problems, n, m), dtype=torch.uint8, device=device
    )
    _C.transport_solve_on_gpu(
        given.cost,
        there(given.a),
        there(given.b),
        there(given.reg),
        f,
        g,
        trace,
        facts,
        tol,
        max_iter,
        rows,
        method == "sinkhorn",
        start is not None,
        tol == 0,
        workspace.data_ptr(),
        stream(given.cost),
    )
    found = np.array(facts.cpu().numpy())  # waits for the solve
    least, most, *places = found[:, 6:].T.tolist()
    whole = [[int(x) for x in place] for place in places]
    _transport.check_cost(given, list(zip(least, most, *whole, strict=True)))
    return f, g, found[:, :6], trace


def stream(cost: Any) -> int:
    """Torch's current stream; where the array's type tells it in C, this is not asked for."""
    if hasattr(type(cost), "__dlpack_c_exchange_api__"):
        return 0
    return _gpu.current_stream(_C.device_of(cost, "cost")[1], cost)
