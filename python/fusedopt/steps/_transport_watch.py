"""Looking at a solve while it runs: the caller's callback, and a progress bar."""

import importlib
from collections.abc import Callable
from typing import Any

from fusedopt.steps._transport import TraceStep


class Watch:
    """What is called after every iteration; a context that closes the bar at its end."""

    def __init__(self, callback: Callable[..., Any] | None, progress: bool) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback is {type(callback).__name__}, expected a function or None")
        self._callback = callback
        self._bar = _progress_bar() if progress else None
        self.wanted = callback is not None or progress

    def of(self, index: int | None, batched: bool) -> Callable[[int, tuple[float, ...]], bool]:
        """For one launch: called with the problem's index in it and a line of the trace.

        The answer is whether to stop. ``index`` is the launch's own place in a list.
        """

        def watch(problem: int, line: tuple[float, ...]) -> bool:
            step = TraceStep.of(line)
            if self._bar is not None:
                self._bar.set_postfix(reg=f"{step.reg:.1e}", error=f"{step.marginal_error:.1e}")
                self._bar.update()
            if self._callback is None:
                return False
            where = (problem,) if batched else () if index is None else (index,)
            return bool(self._callback(step, *where))

        return watch

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _progress_bar() -> Any:
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install fusedopt[progress]") from None
    return tqdm.tqdm(desc="optimal transport", unit=" iterations")
