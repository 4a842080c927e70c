"""What a launch on a GPU needs from the caller's framework: its current stream, and memory."""

import sys
from typing import Any


def current_stream(gpu: int, array: Any) -> int:
    """The stream on which ``array``'s library works now, where its type does not tell in C.

    Raises:
        ValueError: it can't be known.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        raise ValueError(
            f"the arrays on cuda:{gpu} are {type(array).__module__}.{type(array).__name__}, which "
            "does not tell its current stream; pass stream=, the address of a CUDA stream"
        )
    return int(torch.cuda.current_stream(gpu).cuda_stream)


def workspace(size: int, gpu: int, array: Any, stream: int | None) -> Any:
    """Device memory for one launch; its ``data_ptr()`` is the address.

    It may be dropped after the launch: torch hands it out again in the order of the stream, and a
    CUDA graph keeps what was allocated while it was captured.

    Args:
        array: one of those that the launch works on.
        stream: the stream of the launch, if it is not the current one.

    Raises:
        RuntimeError: torch is not loaded.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        raise RuntimeError(
            f"this step on cuda:{gpu} needs memory beside the arrays, which comes from torch (for "
            "AdamW only if a step, lr or the like lies there); import torch"
        )
    device = array.device if isinstance(array, torch.Tensor) else torch.device("cuda", gpu)
    return empty((size,), torch.uint8, device, stream)


def empty(shape: Any, dtype: Any, device: Any, stream: int | None) -> Any:
    """A torch tensor that belongs to a stream; ``None`` is the current one."""
    import torch

    if stream is None or device.type != "cuda":
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)):
        return torch.empty(shape, dtype=dtype, device=device)
