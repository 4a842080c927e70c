"""The GPU as the lab uses it, and a stand-in that does the same on the CPU for a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_FLUSH_BYTES = 512 << 20  # several times any L2


class Cuda:
    """The first CUDA device."""

    name = "cuda"
    backends: tuple[str | None, ...] = ("cuda", "triton")
    scale = 1  # workloads are divided by this

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")

    def synchronize(self) -> None:
        """Wait for all work."""
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Time between two events around the call, with nothing of its data in the L2."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # by reading: written lines would have to leave the L2 during the call
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))

    def wall(self, call: Callable[[], object], times: int) -> float:
        """Time of a call as a caller waits for it, over several without a pause."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """A CUDA graph of the call, which is not run now; the caller has run its like before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def side_stream(self) -> AbstractContextManager[Any]:
        """Another stream than the default one."""
        return torch.cuda.stream(torch.cuda.Stream())


class Fake:
    """The CPU in its place; a captured call is the call."""

    name = "cpu"
    backends: tuple[str | None, ...] = (None,)
    scale = 4096

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall time."""
        return self.wall(call, 1)

    def wall(self, call: Callable[[], object], times: int) -> float:
        """Wall time of a call, over several."""
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call itself."""
        return call

    def side_stream(self) -> AbstractContextManager[Any]:
        """There is none."""
        return nullcontext()


Device = Cuda | Fake
